//! Plants every fault of the catalogue in dumps of several logit regimes and shapes, and counts what the diff makes of them.
//!
//! `cargo run --release --example confusion -- [--slug SLUG] [--regime REGIME] [--shape N,D,V] [--healthy COUNT] [--sample ROWS]`:
//! a matrix of faults by regimes, then what was taken for what; then how near dumps without a fault come to the limits.

use clap::{Parser, ValueEnum};
use fused_xent::diff::fault::{CATALOGUE, Fault};
use fused_xent::diff::sampling::Sampling;
use fused_xent::diff::synth::{Regime, SynthOptions, synth};
use fused_xent::diff::{Candidate, Settings, judge};
use fused_xent::dump::LossSettings;
use fused_xent::kernels::contract::Precision;
use fused_xent::report::headline;
use fused_xent::report::model::{Finding, Report, Verdict};
use serde_json::Value;
use std::collections::BTreeMap;
use std::error::Error;
use std::num::NonZeroUsize;
use std::time::Instant;

#[derive(Parser)]
struct Options {
    /// Only faults whose slug contains this
    #[arg(long, default_value = "")]
    slug: String,
    /// Only this regime
    #[arg(long)]
    regime: Option<Regime>,
    /// Tokens, features and vocab ids; may be repeated
    #[arg(long = "shape", value_delimiter = ',', num_args = 3, default_values_t = SHAPES.concat())]
    shape: Vec<usize>,
    /// Dumps without a fault, of random shapes and losses
    #[arg(long, default_value_t = 500)]
    healthy: u64,
    /// Judge a sample of so many rows
    #[arg(long)]
    sample: Option<NonZeroUsize>,
    /// Print a line per dump
    #[arg(long)]
    lines: bool,
}

const SHAPES: [[usize; 3]; 3] = [[320, 64, 1000], [130, 200, 777], [96, 32, 3000]];
const REGIMES: [Regime; 5] = [Regime::Initial, Regime::Unit, Regime::Trained, Regime::Large, Regime::Huge];
const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];

/// What became of planted faults.
#[derive(Clone, Copy, Default)]
struct Cell {
    /// Named, alone.
    right: usize,
    /// Named together with others that do the same here.
    together: usize,
    /// Seen, and not named.
    unknown: usize,
    /// Seen, and taken for another.
    wrong: usize,
    /// Below what honest rounding does.
    silent: usize,
}

impl Cell {
    fn add(&mut self, other: Cell) {
        self.right += other.right;
        self.together += other.together;
        self.unknown += other.unknown;
        self.wrong += other.wrong;
        self.silent += other.silent;
    }

    fn seen(&self) -> usize {
        self.right + self.together + self.unknown + self.wrong
    }

    fn shown(&self) -> String {
        let counts = [(self.right, '='), (self.together, '~'), (self.unknown, '?'), (self.wrong, '!'), (self.silent, '.')];
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, mark)| format!("{count}{mark}")).collect()
    }
}

/// Whether each number that was planted is found, alone or among those that fit alike; `None` if none was planted.
fn parameters_right(fault: &Fault, finding: &Finding) -> Option<bool> {
    let planted: Vec<(String, Value)> = fault.parameters().into_iter().filter(|(_, value)| value.is_number()).collect();
    let found = |(name, value): &(String, Value)| {
        let close = |other: &Value| other.as_f64().zip(value.as_f64()).is_some_and(|(a, b)| (a - b).abs() <= 1e-2 * b.abs());
        let among = finding.parameters.get(&format!("{name}_candidates")).and_then(Value::as_array);
        finding.parameters.get(name).is_some_and(close) || among.is_some_and(|values| values.iter().any(close))
    };
    (!planted.is_empty()).then(|| planted.iter().all(found))
}

fn judged(options: &SynthOptions, sample: Option<NonZeroUsize>) -> Result<Option<Report>, Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    if synth(folder.path(), options, &()).is_err() {
        return Ok(None);
    }
    let sampling = sample.map_or(Sampling::BySize, Sampling::Rows);
    let settings = Settings { candidates: vec![Candidate::Recorded], sampling, ..Settings::default() };
    Ok(Some(judge(folder.path(), &settings, &())?))
}

fn name(regime: Regime) -> String {
    regime.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
}

/// Dumps that carry no fault: none may diverge. Prints how near they come to what is tolerated, stage by stage.
fn healthy(chosen: &Options) -> Result<(), Box<dyn Error>> {
    let mut alarms = 0;
    let mut seen: BTreeMap<String, Vec<[f64; 2]>> = BTreeMap::new();
    for seed in 0..chosen.healthy {
        let pick = |from: &[usize], salt: u64| from[((seed + 1) * (2 * salt + 7) % 31) as usize % from.len()];
        let gradients = PRECISIONS[seed as usize / REGIMES.len() % 2];
        let mut loss = LossSettings::default();
        if seed % 7 == 0 {
            let options = &mut loss.options;
            (options.logit_softcap, options.z_loss) = (Some(12.0), 1e-3);
            (options.label_smoothing, options.logit_scale) = (0.1, 0.6);
        }
        loss.reduction.cotangent = [1.0, 0.25, 1e-6, 3.0][seed as usize % 4];
        let options = SynthOptions {
            tokens: pick(&[1, 7, 64, 100, 320], 0),
            hidden: pick(&[1, 5, 32, 64], 1),
            vocab: pick(&[3, 100, 300, 1000], 2),
            microbatches: pick(&[1, 2, 3], 3),
            regime: REGIMES[seed as usize % REGIMES.len()],
            gradients,
            weights: seed % 3 == 0,
            loss,
            // Honest where gradients are in bfloat16.
            faults: if gradients == Precision::Bf16 && seed % 2 == 0 { vec![Fault::parse("dlogits-bf16")?] } else { vec![] },
            seed,
            ..SynthOptions::default()
        };
        let Some(report) = judged(&options, chosen.sample)? else { continue };
        if report.verdict == Verdict::Diverge {
            alarms += 1;
            println!("alarm: {options:?}: {}", headline(&report));
        }
        let accumulated = report.candidates.iter().flat_map(|c| &c.accumulated).flat_map(|a| &a.tensors);
        let tensors = report.candidates.iter().flat_map(|c| &c.microbatches).flat_map(|m| &m.tensors).chain(accumulated);
        for tensor in tensors {
            seen.entry(tensor.name.clone()).or_default().push([tensor.ratio, tensor.ratio / tensor.ratio_limit]);
        }
    }
    println!("alarms in {} healthy dumps: {alarms}", chosen.healthy);
    println!("{:28}{:>9}{:>30}{:>30}", "", "tensors", "ratio: median, 99 %, most", "of its limit: the same");
    for (stage, seen) in seen {
        let quantiles = |which: usize| {
            let mut values: Vec<f64> = seen.iter().map(|pair| pair[which]).collect();
            values.sort_by(f64::total_cmp);
            [50, 99, 100].map(|percent| format!("{:>10.3}", values[(values.len() - 1) * percent / 100])).concat()
        };
        println!("{stage:28}{:>9}{}{}", seen.len(), quantiles(0), quantiles(1));
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let chosen = Options::parse();
    let start = Instant::now();
    let regimes: Vec<Regime> = REGIMES.into_iter().filter(|r| chosen.regime.is_none_or(|only| only == *r)).collect();
    let mut total = Cell::default();
    let (mut parameters, mut confusions) = ([0usize; 2], BTreeMap::<(String, String), usize>::new());
    println!("=: named   ~: named with others that do the same here   ?: unknown   !: taken for another   .: below the floor");
    println!("{:34}{}", "", regimes.iter().map(|r| format!("{:>10}", name(*r))).collect::<String>());
    for entry in CATALOGUE.iter().filter(|entry| entry.slug.contains(&chosen.slug)) {
        let mut row = String::new();
        for &regime in &regimes {
            let mut cell = Cell::default();
            for shape in chosen.shape.chunks_exact(3) {
                for gradients in PRECISIONS {
                    let options = SynthOptions {
                        tokens: shape[0],
                        hidden: shape[1],
                        vocab: shape[2],
                        regime,
                        gradients,
                        ..SynthOptions::default()
                    };
                    let Some(report) = judged(&options.planting(entry.example), chosen.sample)? else { continue };
                    let findings: Vec<&Finding> = report.candidates.iter().flat_map(|c| &c.findings).collect();
                    let mut this = Cell::default();
                    match (&findings[..], report.verdict) {
                        (_, Verdict::Agree) => this.silent = 1,
                        ([finding], _) if finding.cause == entry.slug && finding.indistinguishable_from.is_empty() => {
                            this.right = 1
                        }
                        ([f], _) if f.cause == entry.slug || f.indistinguishable_from.iter().any(|c| c == entry.slug) => {
                            this.together = 1;
                        }
                        ([finding, ..], _) if finding.cause == "unknown" => this.unknown = 1,
                        _ => this.wrong = 1,
                    }
                    if let Some(right) =
                        findings.first().filter(|_| this.right == 1).and_then(|f| parameters_right(&entry.example, f))
                    {
                        parameters[usize::from(right)] += 1;
                    }
                    if this.unknown + this.wrong > 0 {
                        let causes: Vec<&str> = findings.iter().map(|f| f.cause.as_str()).collect();
                        *confusions.entry((entry.slug.into(), causes.join(" + "))).or_default() += 1;
                    }
                    if chosen.lines {
                        let found = findings.iter().map(|f| format!("{} {:?} {:?}", f.cause, f.parameters, f.confidence));
                        println!(
                            "  {} {} {gradients:?} {shape:?}: {}",
                            this.shown(),
                            name(regime),
                            found.collect::<Vec<_>>().join("; ")
                        );
                    }
                    cell.add(this);
                }
            }
            row += &format!("{:>10}", cell.shown());
            total.add(cell);
        }
        println!("{:34}{row}", entry.slug);
    }
    for ((planted, found), count) in &confusions {
        println!("{planted} taken for {found}: {count}");
    }
    let share = |part: usize, whole: usize| 100.0 * part as f64 / whole.max(1) as f64;
    let named = total.right + total.together;
    println!(
        "{} faults above the floor: {:.1} % named ({} with others)",
        total.seen(),
        share(named, total.seen()),
        total.together
    );
    println!("taken for another: {}; unknown: {}; below the floor: {}", total.wrong, total.unknown, total.silent);
    println!(
        "parameters right in {:.1} % of {}",
        share(parameters[1], parameters[0] + parameters[1]),
        parameters[0] + parameters[1]
    );
    healthy(&chosen)?;
    println!("{:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
