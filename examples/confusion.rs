//! Plants every fault of the catalogue in every logit regime, and prints what the diff makes of it.
//!
//! `cargo run --release --example confusion [SLUG]`: a line per dump, then the counts.

use fused_xent::diff::fault::CATALOGUE;
use fused_xent::diff::synth::{Regime, SynthOptions, synth};
use fused_xent::diff::{Candidate, Settings, judge};
use fused_xent::report::model::{Report, Verdict};
use std::error::Error;
use std::time::Instant;

fn describe(report: &Report) -> String {
    let worst = |r: &Report| {
        let tensors = r
            .candidates
            .iter()
            .flat_map(|c| c.microbatches.iter().flat_map(|m| &m.tensors).chain(c.accumulated.iter().flat_map(|a| &a.tensors)));
        tensors.map(|t| t.ratio).fold(0.0, f64::max)
    };
    let findings = report.candidates.iter().flat_map(|c| &c.findings).map(|f| {
        let parameters: Vec<String> = f.parameters.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let alike = if f.indistinguishable_from.is_empty() {
            String::new()
        } else {
            format!(" ~ {}", f.indistinguishable_from.join(", "))
        };
        format!("{} [{}] {:.3} {:?}{alike}", f.cause, parameters.join(" "), f.explained, f.confidence)
    });
    format!("worst ratio {:.2}; {}", worst(report), findings.collect::<Vec<_>>().join("; then "))
}

fn main() -> Result<(), Box<dyn Error>> {
    let only = std::env::args().nth(1).unwrap_or_default();
    let (mut right, mut wrong, mut silent) = (0, 0, 0);
    for regime in [Regime::Initial, Regime::Unit, Regime::Trained, Regime::Large, Regime::Huge] {
        for entry in std::iter::once(None).chain(CATALOGUE.iter().map(Some)) {
            let slug = entry.map_or("healthy", |e| e.slug);
            if !slug.contains(&only) {
                continue;
            }
            let folder = tempfile::tempdir()?;
            let start = Instant::now();
            let options = SynthOptions { tokens: 320, regime, ..Default::default() };
            let options = entry.map_or(options.clone(), |e| options.planting(e.example));
            if let Err(e) = synth(folder.path(), &options, &()) {
                println!("none   {regime:?} {slug}: {e}");
                continue;
            }
            let settings = Settings { candidates: vec![Candidate::Recorded], ..Settings::default() };
            let report = judge(folder.path(), &settings, &())?;
            let named = report.candidates.iter().flat_map(|c| &c.findings).map(|f| &f.cause).eq([slug]);
            let result = match (report.verdict, entry) {
                (Verdict::Agree, None) => "right ",
                (Verdict::Agree, Some(_)) => "silent",
                (Verdict::Diverge, _) if named => "right ",
                _ => "WRONG ",
            };
            match result {
                "right " => right += 1,
                "silent" => silent += 1,
                _ => wrong += 1,
            }
            println!("{result} {regime:?} {slug} ({:.1} s): {}", start.elapsed().as_secs_f64(), describe(&report));
        }
    }
    println!("{right} right, {wrong} wrong, {silent} below the floor");
    Ok(())
}
