//! `xent-diff slice <dump> <out>`: a small dump that still shows the divergence.

use super::args::Slice;
use super::exit::Exit;
use super::output::Out;
use super::progress::Bar;
use crate::report::terminal::Style;
use crate::report::text::{Paint, bytes, clean, list};
use crate::slice::{Request, Sliced, cut, smallest};
use std::error::Error;
use std::path::Path;

pub fn run(args: &Slice, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    let Slice { dump, out: to, run, step, microbatch, tokens, quiet } = args;
    let request = Request { run: run.clone(), step: *step, microbatch: *microbatch, tokens: tokens.clone() };
    let sliced = if request == Request::default() { smallest(dump, to, &Bar::steps(*quiet))? } else { cut(dump, to, &request)? };
    if !quiet {
        out.print(&text(to, &sliced, out.style()))?;
    }
    Ok(Exit::Agree)
}

fn text(to: &Path, sliced: &Sliced, style: Style) -> String {
    let Sliced { cut, tokens, of_tokens, dropped, shown, .. } = sliced;
    let path = to.display().to_string();
    let mut out = format!("{}: written, {}\n", Paint::Bold.on(&clean(&path), style.colour), bytes(sliced.bytes));
    let mut line = |label: &str, text: &str| style.entry(&mut out, &format!("  {label}"), text);
    let microbatch = cut.microbatch.map_or("all microbatches".to_owned(), |m| format!("microbatch {m}"));
    let rows = cut.tokens.as_ref().filter(|_| tokens < of_tokens).map_or("all tokens".to_owned(), |ranges| {
        let ranges: Vec<String> = ranges.iter().map(|r| format!("{}..{}", r.start, r.end)).collect();
        format!("{tokens} of {of_tokens} tokens: {}", ranges.join(", "))
    });
    line("kept", &format!("run {}, step {}, {microbatch}, {rows}", cut.run_id, cut.step));
    for dropped in dropped {
        line("dropped", &format!("{}: {}", dropped.tensor, dropped.reason));
    }
    if let Some(shown) = shown {
        line("shows", &format!("{} diverges first; cause {}", shown.stage, list(&shown.causes)));
    }
    out
}
