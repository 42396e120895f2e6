//! Trains a small causal language model, in plain Rust, with this library's fused cross-entropy as its loss; captures
//! chosen steps; and, if asked, trains with a known fault in the loss's backward.
//!
//! ```text
//! cargo run --release --example train_lm -- --steps 200 --capture-at 0,199 --dumps /tmp/lm
//! cargo run --release -- /tmp/lm
//! ```

mod adam;
mod attention;
mod batches;
mod loss;
mod model;
mod random;
#[cfg(test)]
mod tests;
mod text;
mod trainer;
mod vocabulary;

use batches::{Batches, IGNORE};
use clap::Parser;
use fused_xent::capture::{Capture, CaptureOptions, CaptureSteps};
use fused_xent::dump::LossSettings;
use fused_xent::kernels::Kernel;
use fused_xent::kernels::contract::{Contract, Precision};
use fused_xent::kernels::problem::{DType, LossOptions};
use loss::Fault;
use random::Random;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;
use trainer::{Outcome, Trainer};
use vocabulary::Vocabulary;

/// Train a small causal language model with the fused cross-entropy loss.
#[derive(Clone, Debug, Parser)]
#[command(name = "train_lm", args_override_self = true)]
struct Options {
    /// Training steps
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..))]
    steps: u64,
    /// Seed of the weights, the order of the text and the masks
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// D: hidden features, a multiple of 16
    #[arg(long, default_value_t = 64, value_parser = hidden)]
    hidden: usize,
    /// V: ids of the vocabulary, learned from the text
    #[arg(long, default_value_t = 1000)]
    vocab: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 64, value_parser = positive)]
    seq: usize,
    /// Sequences of a microbatch
    #[arg(long, default_value_t = 4, value_parser = positive)]
    batch: usize,
    /// Microbatches of a step
    #[arg(long, default_value_t = 2, value_parser = positive)]
    microbatches: usize,
    /// Learning rate of Adam
    #[arg(long, default_value_t = 3e-3)]
    rate: f32,
    /// Steps to capture, such as 0,150
    #[arg(long, value_name = "STEPS", value_delimiter = ',', requires = "dumps")]
    capture_at: Vec<u64>,
    /// Folder that the captured steps go to
    #[arg(long, value_name = "DIR", requires = "capture_at")]
    dumps: Option<PathBuf>,
    /// Names the run in its dumps; else the time does
    #[arg(long, value_name = "NAME")]
    run_id: Option<String>,
    /// Train with this fault in the loss's backward
    #[arg(long)]
    fault: Option<Fault>,
    /// Text to train on, a file or a folder; else the project's documents and sources, and the Rust book if installed
    #[arg(long, value_name = "PATH")]
    text: Option<PathBuf>,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number above 0".to_owned())
}

fn hidden(text: &str) -> Result<usize, String> {
    positive(text).ok().filter(|n| n % model::HEAD == 0).ok_or_else(|| format!("expected a multiple of {}", model::HEAD))
}

/// Text beyond this many bytes is left out.
const TEXT_LIMIT: usize = 1 << 20;

/// A trainer with the text it trains on and the capture of its steps.
struct Training {
    trainer: Trainer,
    batches: Batches,
    microbatches: usize,
    capture: Option<Capture>,
    step: u64,
}

impl Training {
    fn new(options: &Options, documents: &[String]) -> Result<Self, Box<dyn Error>> {
        let &Options { steps, seed, hidden, vocab, seq, batch, microbatches, rate, fault, .. } = options;
        let capture = options.dumps.as_ref().map(|dumps| capture(options, dumps)).transpose()?;
        if let Some(step) = options.capture_at.iter().find(|&&step| step >= steps) {
            return Err(format!("--capture-at {step}: the last of {steps} steps is {}", steps - 1).into());
        }
        let vocabulary = Vocabulary::learn(documents, vocab)?;
        let documents: Vec<_> = documents.iter().map(|d| vocabulary.encode(d)).collect();
        let batches = Batches::new(&documents, seq, batch, Random::new(seed.wrapping_add(1)))
            .ok_or("the text holds no two tokens in a row to learn from")?;
        let trainer = Trainer::new(vocab, seq, hidden, rate, fault, &mut Random::new(seed));
        Ok(Self { trainer, batches, microbatches, capture, step: 0 })
    }

    fn step(&mut self) -> Result<Outcome, Box<dyn Error>> {
        let microbatches: Vec<_> = (0..self.microbatches).map(|_| self.batches.next()).collect();
        let capture = self.capture.as_ref().map(|c| c.step(self.step)).transpose()?.flatten();
        self.step += 1;
        self.trainer.step(&microbatches, capture)
    }
}

/// A capture that declares the loss that training means to compute and the roundings of the kernel that computes it.
fn capture(options: &Options, dumps: &Path) -> Result<Capture, Box<dyn Error>> {
    let loss = LossSettings {
        options: LossOptions { ignore_index: IGNORE.into(), ..LossOptions::default() },
        reduction: loss::REDUCTION,
        ..LossSettings::default()
    };
    let Contract { logits, dlogits, accumulate, d_hidden, d_unembedding, .. } =
        Kernel::best().contract([DType::Bf16; 2], [DType::Bf16; 2]);
    let [logits, dlogits, accumulate, d_hidden, d_unembedding] =
        [logits, dlogits, accumulate, d_hidden, d_unembedding].map(Precision::name);
    let contract = serde_json::json!({
        "logits": logits, "dlogits": dlogits, "accumulate": accumulate, "d_hidden": d_hidden, "d_unembedding": d_unembedding
    });
    let capture = CaptureOptions {
        steps: CaptureSteps::At(options.capture_at.clone()),
        run_id: options.run_id.clone(),
        loss,
        num_microbatches: options.microbatches,
        contract: Some(contract),
        verify: true,
        ..CaptureOptions::default()
    };
    Ok(Capture::new(dumps, capture)?)
}

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let documents = match &options.text {
        Some(path) => text::read(path, TEXT_LIMIT)?,
        None => text::find(TEXT_LIMIT)?,
    };
    let bytes: usize = documents.iter().map(String::len).sum();
    println!("{} documents, {} KiB of text", documents.len(), bytes >> 10);
    let mut training = Training::new(options, &documents)?;
    let step_tokens = options.microbatches * options.batch * options.seq;
    let start = Instant::now();
    let mut first = None;
    let mut last = 0.0;
    for step in 0..options.steps {
        let outcome = training.step()?;
        last = outcome.loss;
        first.get_or_insert(outcome.loss);
        if step % 10 == 0 || step + 1 == options.steps {
            let rate = (step + 1) as f64 * step_tokens as f64 / start.elapsed().as_secs_f64();
            println!(
                "step {step:5}   loss {:.4}   gradient norm {:.4}   {rate:.0} tokens/s",
                outcome.loss, outcome.gradient_norm
            );
        }
    }
    println!("loss {:.4} → {last:.4} in {} steps, {:.1} s", first.unwrap_or(last), options.steps, start.elapsed().as_secs_f64());
    Ok(())
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
