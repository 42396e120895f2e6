//! Results and how they are shown.

pub mod model;
