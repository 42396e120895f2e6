//! `xent-diff synth <dir>`: a dump made to order.

use super::args::Synth;
use super::exit::Exit;
use super::output::Out;
use super::progress::Bar;
use crate::diff::synth::{SynthOptions, synth};
use crate::report::text::list;
use std::error::Error;

pub fn run(args: &Synth, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    let options = SynthOptions {
        tokens: args.tokens,
        hidden: args.hidden,
        vocab: args.vocab,
        microbatches: args.microbatches,
        processes: args.processes,
        regime: args.regime,
        masked: args.masked,
        weights: args.weights,
        loss: args.loss,
        gradients: args.gradients,
        contract: args.contract.clone(),
        inner: args.inner,
        faults: args.faults.clone(),
        seed: args.seed,
        step: args.step,
    };
    synth(&args.dir, &options, &Bar::steps(args.quiet))?;
    let slugs: Vec<&str> = args.faults.iter().map(|fault| fault.slug()).collect();
    let carries = if slugs.is_empty() { "no fault".to_owned() } else { list(&slugs) };
    if !args.quiet {
        out.print(&format!("{}: written, with gradients that carry {carries}\n", args.dir.display()))?;
    }
    Ok(Exit::Agree)
}
