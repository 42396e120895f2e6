//! Results and how they are shown: one plain result struct ([`model`]), and what is rendered from it.

pub mod html;
pub mod json;
pub mod model;
mod pattern;
mod summary;
pub mod terminal;
pub mod text;

pub use summary::headline;
