//! The renderers on reports made by hand.

mod html;
mod json;
mod samples;
mod terminal;
