//! `xent-diff faults`: the catalogue.

use super::exit::Exit;
use super::output::Out;
use crate::diff::fault::CATALOGUE;
use crate::report::text::{Paint, wrap};
use std::error::Error;

pub fn run(out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    let style = out.style();
    let mut text = String::new();
    let mut section = "";
    for entry in CATALOGUE {
        if entry.section != section {
            section = entry.section;
            let gap = if text.is_empty() { "" } else { "\n" };
            text += &format!("{gap}{}\n", Paint::Bold.on(section, style.colour));
        }
        text += &format!("  {}\n", Paint::Green.on(entry.slug, style.colour));
        for (words, paint) in [(entry.title, None), (entry.leaves_behind, Some(Paint::Dim))] {
            for line in wrap(words, style.width.saturating_sub(6).max(20)) {
                text += &format!("      {}\n", paint.map_or(line.clone(), |paint| paint.on(&line, style.colour)));
            }
        }
    }
    out.print(&text)?;
    Ok(Exit::Agree)
}
