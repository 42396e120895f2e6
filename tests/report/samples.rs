//! Reports made by hand.

use fused_xent::report::model::*;
use fused_xent::report::plots::*;
use fused_xent::report::substitution::*;
use serde_json::json;

/// N and D of every microbatch here; V is 1000.
const SHAPE: [usize; 2] = [512, 64];

pub fn tensor(name: &str, rel_l2: f64, floor: f64) -> TensorReport {
    let ratio = rel_l2 / floor;
    let diverges = ratio > 1.5;
    TensorReport {
        name: name.to_owned(),
        shape: SHAPE,
        sampled_from: None,
        verdict: if diverges { Verdict::Diverge } else { Verdict::Agree },
        reason: diverges.then(|| "the error is above what honest rounding makes".to_owned()),
        reference_norm: 0.1,
        rel_l2: Some(rel_l2),
        max_abs: rel_l2 / 10.0,
        cosine: Some(1.0 - rel_l2 * rel_l2 / 2.0),
        scale: Some(1.0),
        residual: Some(rel_l2),
        noise_floor: Some(floor),
        ratio,
        ratio_limit: 1.5,
        ulp_p99: 1.0,
        nonfinite: 0,
        out_of_bound: 0,
        worst: diverges.then(|| Worst {
            index: [42, 3],
            place: "vocab id 42, feature 3".to_owned(),
            candidate: 1.2345e-3,
            reference: 1.23e-3,
        }),
        zero_tail: None,
        pattern: None,
        plots: None,
    }
}

pub fn microbatch(index: usize, tensors: Vec<TensorReport>) -> MicrobatchReport {
    MicrobatchReport { microbatch: index, tokens: 512, valid_tokens: 500, tensors }
}

pub fn healthy_tensors() -> Vec<TensorReport> {
    vec![
        tensor("loss", 1.1e-7, 1.2e-7),
        tensor("lse", 0.6e-7, 0.62e-7),
        tensor("label_logits", 0.9e-7, 1e-7),
        tensor("d_hidden", 1.66e-3, 1.65e-3),
        tensor("d_unembedding", 1.71e-3, 1.7e-3),
    ]
}

pub fn candidate(name: &str, microbatches: Vec<MicrobatchReport>) -> CandidateReport {
    CandidateReport {
        candidate: name.to_owned(),
        description: if name == "recorded" { "gradients of the training run" } else { "portable, float32 throughout" }.to_owned(),
        run_id: "run-a".to_owned(),
        step: 0,
        verdict: microbatches.iter().flat_map(|m| &m.tensors).map(|t| t.verdict).max().unwrap_or(Verdict::Agree),
        contract: ContractReport {
            source: "declared",
            cotangent: None,
            logits: "f32",
            dlogits: "f32",
            accumulate: "f32",
            d_hidden: "bf16",
            d_unembedding: "bf16",
        },
        sample: None,
        microbatches,
        accumulated: None,
        first_divergence: None,
        substitution: None,
        findings: Vec::new(),
        crossing: None,
        presence: Default::default(),
    }
}

pub fn report(candidates: Vec<CandidateReport>) -> Report {
    Report {
        verdict: candidates.iter().map(|c| c.verdict).max().unwrap_or(Verdict::Agree),
        dump: DumpSummary {
            path: "dumps/tiny".to_owned(),
            run_ids: vec!["run-a".to_owned()],
            processes: 2,
            steps: vec![0],
            interrupted: Vec::new(),
        },
        candidates,
        warnings: Vec::new(),
        baseline: None,
    }
}

pub fn agreeing() -> Report {
    let mut cpu = candidate("cpu", vec![microbatch(0, healthy_tensors())]);
    cpu.accumulated = Some(AccumulatedReport {
        tensors: vec![tensor("d_unembedding", 1.7e-3, 1.7e-3)],
        grad_norm: Some(GradNorm { candidate: 1.2034, reference: 1.2031, tolerance: 2e-3, verdict: Verdict::Agree }),
    });
    report(vec![cpu])
}

/// A stage that has all its error, 2.65 times the floor, from what comes before it.
pub fn rung(microbatch: Option<usize>, stage: &str) -> Substituted {
    Substituted {
        microbatch,
        stage: stage.to_owned(),
        ratio: 2.65,
        inputs: Vec::new(),
        inherited: 0.99996,
        entering_ratio: 1.01,
        entering_limit: 1.5,
        enters: false,
        rounded_inputs: false,
        record: Vec::new(),
        rows: None,
        along: None,
    }
}

pub fn input(stage: &str, diverges: bool) -> StageInput {
    StageInput { stage: stage.to_owned(), diverges }
}

/// A fault in the label gradients, seen in dK, its accumulation and its norm.
fn scattered() -> CandidateReport {
    let mut tensors = healthy_tensors();
    let mut label = tensor("d_unembedding_label", 4.41e-3, 2e-7);
    label.reason = Some("rel. L2 is 22050 times what honest rounding makes".to_owned());
    label.out_of_bound = 17;
    label.pattern = Some(Pattern {
        kind: "label_rows".to_owned(),
        share: 0.9999,
        rows: vec![[3, 4], [17, 19], [42, 43], [77, 78], [91, 93], [95, 96]],
        ..Pattern::default()
    });
    tensors.insert(3, label);
    tensors[5] = tensor("d_unembedding", 4.5e-3, 1.7e-3);
    let mut recorded = candidate("recorded", vec![microbatch(0, tensors)]);
    recorded.accumulated = Some(AccumulatedReport {
        tensors: vec![tensor("accumulated_d_unembedding", 4.5e-3, 1.7e-3)],
        grad_norm: Some(GradNorm { candidate: 1.203, reference: 1.001, tolerance: 2e-3, verdict: Verdict::Diverge }),
    });
    recorded.first_divergence = Some(Divergence { microbatch: Some(0), stage: "d_unembedding_label".to_owned(), enters: None });
    let [mut label, mut dk, mut over_step] =
        ["d_unembedding_label", "d_unembedding", "accumulated_d_unembedding"].map(|stage| rung(Some(0), stage));
    (label.ratio, label.entering_ratio, label.enters) = (22050.0, 22050.0, true);
    label.record = vec!["d_label_logits".to_owned()];
    dk.inputs = vec![input("lse", false), input("d_unembedding_label", true)];
    over_step.inputs = vec![input("d_unembedding", true)];
    over_step.microbatch = None;
    let repair = |repaired: &str, stage: &str| Repair {
        repaired: repaired.to_owned(),
        microbatch: Some(0),
        stage: stage.to_owned(),
        before: 2.65,
        after: 1.01,
    };
    recorded.substitution = Some(Substitution {
        rungs: vec![label, dk, over_step],
        repairs: vec![repair("d_unembedding_label", "d_unembedding"), repair("d_unembedding_label", "accumulated_d_unembedding")],
    });
    recorded.findings = vec![Finding {
        rank: 1,
        cause: "label-scatter-bf16".to_owned(),
        title: "label gradients are scatter-added into dK in bfloat16".to_owned(),
        explained: 0.99993,
        remaining_ratio: 1.02,
        confidence: Confidence::Certain,
        parameters: json!({ "chunks": 16, "order": "token" }).as_object().unwrap().clone(),
        evidence: "the error sits in label rows only and grows with the hits per row: 1.6e-3 at one hit, 7e-3 at 54".to_owned(),
        remedy: "add the label part in float32 inside the kernel, or scatter into a float32 buffer and round once".to_owned(),
        runner_up: Some(RunnerUp { cause: "dk-parts-rounded".to_owned(), explained: 0.41 }),
        indistinguishable_from: Vec::new(),
        tell_apart: Vec::new(),
    }];
    recorded
}

pub fn certain() -> Report {
    report(vec![scattered()])
}

pub fn two_candidates() -> Report {
    let mut report = report(vec![scattered(), agreeing().candidates.remove(0)]);
    report.dump.interrupted = vec!["proc_00001/step_00000000/mb_0001".to_owned()];
    report.warnings = vec!["3 shards carry no blake3 checksum: their bytes were not checked".to_owned()];
    report
}

pub fn unknown() -> Report {
    let mut tensors = healthy_tensors();
    tensors[3] = tensor("d_hidden", 0.31, 1.65e-3);
    tensors[3].pattern = Some(Pattern { kind: "rows".to_owned(), share: 0.98, first_bad: Some(384), ..Pattern::default() });
    let mut recorded = candidate("recorded", vec![microbatch(0, tensors)]);
    recorded.first_divergence = Some(Divergence { microbatch: Some(0), stage: "d_hidden".to_owned(), enters: None });
    let part = |share, share_of_one, factors| AlongPart { share, share_of_one, factors };
    let mut rung = rung(Some(0), "d_hidden");
    (rung.ratio, rung.entering_ratio, rung.enters, rung.inherited) = (187.9, 187.9, true, 0.0);
    rung.inputs = vec![input("lse", false)];
    rung.record = ["d_lse", "d_hidden_lse", "d_hidden_label"].map(str::to_owned).to_vec();
    rung.along = Some(Along {
        lse: part(0.991, 0.2, [0.82, 1.31]),
        label: part(0.4, 0.1, [0.7, 1.2]),
        gradient: part(0.3, 0.1, [-3.0, 4.0]),
        both: 0.992,
        as_in_d_hidden: None,
    });
    recorded.substitution = Some(Substitution { rungs: vec![rung], repairs: Vec::new() });
    recorded.findings = vec![Finding {
        rank: 1,
        cause: "unknown".to_owned(),
        title: "no catalogued fault explains it".to_owned(),
        explained: 0.0,
        remaining_ratio: 187.9,
        confidence: Confidence::Possible,
        parameters: Default::default(),
        evidence: "dQ is off from token 384 on; dK is at its floor".to_owned(),
        remedy: "look at what the kernel does with the last tokens".to_owned(),
        runner_up: Some(RunnerUp { cause: "token-tail-dropped".to_owned(), explained: 0.33 }),
        indistinguishable_from: Vec::new(),
        tell_apart: Vec::new(),
    }];
    report(vec![recorded])
}

pub fn nonfinite() -> Report {
    let mut tensors = healthy_tensors();
    tensors[4].verdict = Verdict::Diverge;
    tensors[4].nonfinite = 64;
    tensors[4].reason = Some("64 elements are not finite".to_owned());
    tensors[4].worst =
        Some(Worst { index: [7, 0], place: "vocab id 7, feature 0".to_owned(), candidate: f64::NAN, reference: 0.0125 });
    tensors[3].reference_norm = 0.0;
    tensors[3].rel_l2 = None;
    tensors[3].noise_floor = Some(0.0);
    tensors[3].ratio = f64::INFINITY;
    tensors[3].verdict = Verdict::Diverge;
    tensors[3].max_abs = 2.5e-4;
    let mut cpu = candidate("cpu", vec![microbatch(0, tensors)]);
    cpu.first_divergence = Some(Divergence { microbatch: Some(0), stage: "d_hidden".to_owned(), enters: None });
    cpu.findings = vec![Finding {
        rank: 1,
        cause: "nonfinite".to_owned(),
        title: "dK holds values that are not finite".to_owned(),
        explained: f64::NAN,
        remaining_ratio: f64::INFINITY,
        confidence: Confidence::Likely,
        parameters: Default::default(),
        evidence: "row 7 of dK is NaN in all 64 features".to_owned(),
        remedy: "look for an overflow before the gradient product".to_owned(),
        runner_up: None,
        indistinguishable_from: vec!["dk-accumulate-bf16".to_owned()],
        tell_apart: vec!["the parts of dK, in float32".to_owned()],
    }];
    report(vec![cpu])
}

/// `count` microbatches, of which those in `bad` diverge in dQ.
pub fn microbatches(count: usize, bad: &[usize]) -> Report {
    let of = |index: usize| {
        let mut tensors = healthy_tensors();
        if bad.contains(&index) {
            tensors[3] = tensor("d_hidden", 0.02 * (1 + index) as f64, 1.65e-3);
        }
        microbatch(index, tensors)
    };
    let mut recorded = candidate("recorded", (0..count).map(of).collect());
    recorded.accumulated = Some(AccumulatedReport { tensors: vec![tensor("d_unembedding", 1.7e-3, 1.7e-3)], grad_norm: None });
    recorded.first_divergence =
        bad.first().map(|&m| Divergence { microbatch: Some(m), stage: "d_hidden".to_owned(), enters: None });
    report(vec![recorded])
}

/// A run of as many processes as microbatches, with every figure as large as it gets; one folder was not committed.
pub fn drawn(count: usize) -> Report {
    let mut report = microbatches(count, &[2, 11]);
    let candidate = &mut report.candidates[0];
    for (m, microbatch) in candidate.microbatches.iter_mut().enumerate() {
        for tensor in &mut microbatch.tensors {
            tensor.plots = Some(Box::new(plots(tensor, count, m)));
        }
    }
    let ratio = (0..24 * 24).map(|cell| if cell % 24 < 2 { 40.0 } else { 0.2 }).collect();
    candidate.crossing = Some(Crossing {
        microbatch: 2,
        tile: [32, 64],
        of: [24 * 32, 24 * 64],
        maps: vec![CrossingMap { stage: "d_hidden", ratio, explained: 0.97 }],
    });
    candidate.presence = Presence { processes: count, microbatches: count, absent: vec![[3, 5]] };
    report
}

fn plots(tensor: &TensorReport, processes: usize, m: usize) -> Plots {
    let ratio = tensor.ratio as f32;
    let span = |i: usize| Span { rows: [1000 * i, 1000 * i + 1000], ratio, worst: 2.0 * ratio };
    let hits = |i: usize| HitsPoint { hits: i / 24, error: 1.7e-3 * (i % 24) as f32, floor: 1.6e-3 };
    let bin = |i: i32| {
        let from = 2f64.powi(i - 40);
        MagnitudeBin { from, count: 9, rms: 2e-3 * from, largest: 4e-3 * from, bound: 1e-2 * from }
    };
    Plots {
        profile: (0..256).map(span).collect(),
        hits: if tensor.name == "d_unembedding" { (0..480).map(hits).collect() } else { vec![] },
        magnitude: (0..40).map(bin).collect(),
        processes: (0..processes).map(|process| ProcessCell { process, ratio: tensor.ratio * (process + m) as f64 }).collect(),
        worst: tensor.worst.clone().into_iter().collect(),
    }
}
