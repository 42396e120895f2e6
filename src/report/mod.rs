//! Results and how they are shown: one plain result struct ([`model`]), and what is rendered from it.

pub mod baseline;
mod entry;
mod figures;
pub mod html;
pub mod json;
pub mod markdown;
pub mod model;
mod pattern;
pub mod plots;
pub mod substitution;
mod summary;
pub mod terminal;
pub mod text;

pub use summary::headline;
