//! `xent-diff tpu-selftest`: whether the TPU kernels are right and fast on the TPU at hand.

use super::args::TpuSelftest;
use super::exit::Exit;
use super::output::Out;
use std::error::Error;

#[cfg(not(feature = "pjrt"))]
pub fn run(_: &TpuSelftest, _: &mut Out) -> Result<Exit, Box<dyn Error>> {
    Err("tpu-selftest: this xent-diff was built without PJRT; build it with `--features pjrt`".into())
}

#[cfg(feature = "pjrt")]
pub fn run(args: &TpuSelftest, out: &mut Out) -> Result<Exit, Box<dyn Error>> {
    use super::output::Target;
    use super::progress::Bar;
    use crate::report::json::to_string;
    use crate::selftest::{Settings, selftest};

    if let Some(target) = &args.json {
        target.check()?;
    }
    let settings = Settings {
        plugin: args.plugin.clone(),
        libtpu: args.libtpu.clone(),
        generation: args.generation,
        quick: args.quick,
        dump: args.dump.clone(),
    };
    let report = {
        let bar = Bar::steps(args.quiet);
        selftest(&settings, &bar)?
    };
    if args.json != Some(Target::Stdout) {
        out.print(&shown::text(&report, args.quiet, out.style()))?;
    }
    if let Some(target) = &args.json {
        target.write(&to_string(&report), out)?;
    }
    Ok(shown::exit(report.verdict))
}

#[cfg(feature = "pjrt")]
mod shown {
    use super::Exit;
    use crate::report::model;
    use crate::report::terminal::Style;
    use crate::report::text::{Paint, Table, bytes, clean, percent, scientific, times, wrap};
    use crate::selftest::report::{CaseReport, Compiled, Outcome, Report, Times, Timing, Units, Verdict};

    const STAGES: [&str; 5] = ["loss", "lse", "label_logits", "d_hidden", "d_unembedding"];

    pub fn exit(verdict: Verdict) -> Exit {
        match verdict {
            Verdict::Pass | Verdict::NotRunOnATpu => Exit::Agree,
            Verdict::Fail => Exit::Diverge,
        }
    }

    pub fn text(report: &Report, quiet: bool, style: Style) -> String {
        let sentence = sentence(report, style);
        if quiet {
            return sentence;
        }
        let environment = &report.environment;
        let mut out = String::new();
        let mut entry = |label: &str, text: &str| style.entry(&mut out, label, text);
        let [major, minor] = environment.api_version;
        entry("plugin", &format!("{}, PJRT API {major}.{minor}", environment.plugin));
        entry("platform", &format!("{}, {}", environment.platform, environment.platform_version));
        let devices = environment.devices.len();
        entry("device", &format!("{}, the first of {devices}", environment.devices[0]));
        match (&environment.compiler, &environment.no_compiler, environment.generation) {
            (Some(compiler), _, Some(generation)) => {
                entry("compiled for", &format!("{generation} ({}), not executed, by {}", compiler.kind, compiler.library));
            }
            (None, Some(why), _) => entry("compiled for", &format!("nothing: {why}")),
            (.., generation) => entry("generation", generation.unwrap_or("none")),
        }
        let executed =
            if environment.executed == "mosaic" { "the TPU kernels" } else { "StableHLO programs, in place of the TPU kernels" };
        entry("executed", executed);
        out += &format!("\n{}\n{}", cases(report, style), timings(&report.timings, style));
        out += "\n";
        for case in report.cases.iter().filter(|case| case.outcome == Outcome::Fail) {
            style.entry(
                &mut out,
                "wrong",
                &format!("{} ({}): {}", case.name, case.about, case.reason.as_deref().unwrap_or_default()),
            );
            let worst =
                case.worst().filter(|tensor| tensor.verdict == model::Verdict::Diverge).and_then(|tensor| tensor.worst.as_ref());
            if let Some(worst) = worst {
                let values = format!("{}, reference {}", scientific(worst.candidate), scientific(worst.reference));
                style.entry(&mut out, "", &format!("worst at {}: {values}", worst.place));
            }
        }
        for case in report.cases.iter().filter(|case| case.outcome == Outcome::NotRun) {
            style.entry(&mut out, "not run", &format!("{}: {}", case.name, case.reason.as_deref().unwrap_or_default()));
        }
        for units in report.cases.iter().filter_map(|case| case.isolates) {
            let Units { what, largest, at, .. } = units;
            let off = match largest {
                0.0 => "exact".to_owned(),
                _ => format!("off by at most {largest:.2} units in the last place, at {}", scientific(at)),
            };
            style.entry(&mut out, what, &off);
        }
        out + &sentence
    }

    /// The verdict, marked and coloured.
    fn sentence(report: &Report, style: Style) -> String {
        let (mark, paint) = match report.verdict {
            Verdict::Pass => (style.mark(model::Verdict::Agree), Paint::Green),
            Verdict::Fail => (style.mark(model::Verdict::Diverge), Paint::Red),
            Verdict::NotRunOnATpu => ("–".to_owned(), Paint::Bold),
        };
        let lines = wrap(&report.sentence, style.width.saturating_sub(2).max(20));
        let line =
            |(i, line): (usize, &String)| format!("{} {}\n", if i == 0 { &mark } else { " " }, paint.on(line, style.colour));
        lines.iter().enumerate().map(line).collect()
    }

    /// A line a case: each stage's ratio to the floor, and the worst one's to its limit.
    fn cases(report: &Report, style: Style) -> String {
        let ahead = report.environment.compiler.is_some();
        let mut heading = vec!["case", "loss", "lse", "label", "dQ", "dK", ">of limit", "twice", ">time"];
        if ahead {
            heading.extend([">workspace", ">code"]);
        }
        heading.push("");
        let mut table = Table::new(&heading);
        for case in &report.cases {
            let mut row = vec![clean(&case.name).into_owned()];
            row.extend(STAGES.map(|stage| {
                let tensor = case.tensors.iter().find(|tensor| tensor.name == stage);
                tensor.map_or("–".to_owned(), |tensor| times(tensor.ratio))
            }));
            let of_limit = case.worst().map(|tensor| percent(tensor.ratio / tensor.ratio_limit));
            row.push(of_limit.unwrap_or_else(|| "–".to_owned()));
            row.push(case.same_twice.map_or("–", |same| if same { "same" } else { "differs" }).to_owned());
            row.push(format!("{:.1} s", case.seconds));
            if ahead {
                row.extend(compiled(case));
            }
            row.push(case.outcome.word().to_owned());
            table.row(row);
        }
        table.render(2, style.colour)
    }

    /// Bytes of HBM and of code, of both passes.
    fn compiled(case: &CaseReport) -> [String; 2] {
        if case.compiled_ahead.is_empty() {
            return ["–"; 2].map(str::to_owned);
        }
        let most = case.compiled_ahead.iter().map(|c| c.workspace_bytes).max().unwrap_or(0);
        [most, case.compiled_ahead.iter().map(|c| c.code_bytes).sum()].map(bytes)
    }

    fn timings(timings: &[Timing], style: Style) -> String {
        let mut table =
            Table::new(&["N, D, V", "program", ">median ms", ">least", ">most", ">TFLOP/s", ">of MXU limit", ">compiled in"]);
        let mut others = String::new();
        for Timing { shape: [tokens, hidden, vocab], program, times } in timings {
            let shape = format!("{tokens}, {hidden}, {vocab}");
            match times {
                Times::Measured { median_ms, least_ms, most_ms, tflop_per_s, share_of_mxu, compile_seconds, .. } => {
                    table.row(vec![
                        shape,
                        program.clone(),
                        format!("{median_ms:.3}"),
                        format!("{least_ms:.3}"),
                        format!("{most_ms:.3}"),
                        format!("{tflop_per_s:.2}"),
                        share_of_mxu.map_or("–".to_owned(), percent),
                        format!("{compile_seconds:.1} s"),
                    ])
                }
                Times::CompiledAhead { compiled_ahead: Compiled { workspace_bytes, code_bytes, seconds, .. } } => {
                    let needs = format!("{} of workspace, {} of code", bytes(*workspace_bytes), bytes(*code_bytes));
                    style.entry(&mut others, "compiled", &format!("{program} at {shape} in {seconds:.1} s: {needs}"));
                }
                Times::Refused { error } => style.entry(&mut others, "not timed", &format!("{program} at {shape}: {error}")),
            }
        }
        table.render(2, style.colour) + &others
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::selftest::report::{Environment, SCHEMA};

        #[test]
        fn a_wrong_case_is_an_exit_code_of_1() {
            let codes = [Verdict::Pass, Verdict::NotRunOnATpu, Verdict::Fail].map(exit);
            assert_eq!(codes, [Exit::Agree, Exit::Agree, Exit::Diverge]);
        }

        #[test]
        fn what_is_wrong_is_said_below_the_table() {
            let environment = Environment {
                plugin: "libtpu.so".into(),
                api_version: [0, 116],
                platform: "tpu".into(),
                platform_version: "1".into(),
                devices: vec!["TPU v5 lite".into()],
                executed: "mosaic",
                generation: Some("v5e"),
                compiler: None,
                no_compiler: None,
                host: ["linux", "x86_64"],
                threads: 1,
            };
            let case = CaseReport {
                name: "chunks".into(),
                about: "tails",
                shape: [1, 1, 1],
                outcome: Outcome::Fail,
                reason: Some("out of VMEM".into()),
                same_twice: None,
                isolates: Some(Units { what: "exp", largest: 7.25, at: 0.5, found: 0.5 }),
                tensors: vec![],
                compiled_ahead: vec![],
                seconds: 1.0,
            };
            let times = Times::Refused { error: "no room".into() };
            let report = Report {
                schema: SCHEMA,
                version: "1",
                verdict: Verdict::Fail,
                sentence: "the TPU kernels fail".into(),
                environment,
                cases: vec![case],
                timings: vec![Timing { shape: [1, 2, 3], program: "mosaic forward".into(), times }],
                seconds: 1.0,
            };
            let style = Style { colour: false, width: 100 };
            let text = text(&report, false, style);
            for line in [
                "generation    v5e\n",
                "executed      the TPU kernels\n",
                "wrong         chunks (tails): out of VMEM\n",
                "exp           off by at most 7.25 units in the last place, at 0.500\n",
                "not timed     mosaic forward at 1, 2, 3: no room\n",
                "✗ the TPU kernels fail\n",
            ] {
                assert!(text.contains(line), "no {line:?} in\n{text}");
            }
            assert_eq!(super::text(&report, true, style), "✗ the TPU kernels fail\n");
        }
    }
}
