//! The renderers on reports made by hand.

mod baseline;
mod html;
mod json;
mod markdown;
mod samples;
mod terminal;
