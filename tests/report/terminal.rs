use crate::samples;
use fused_xent::report::model::{Report, SampleReport, Verdict};
use fused_xent::report::terminal::{Style, overview, render, verdict};
use insta::assert_snapshot;

const PLAIN: Style = Style { colour: false, width: 100 };

fn longest(text: &str) -> usize {
    text.lines().map(|line| line.chars().count()).max().unwrap_or(0)
}

fn all() -> [Report; 6] {
    [
        samples::agreeing(),
        samples::certain(),
        samples::two_candidates(),
        samples::unknown(),
        samples::nonfinite(),
        samples::microbatches(3, &[1]),
    ]
}

#[test]
fn agreement() {
    assert_snapshot!(render(&samples::agreeing(), PLAIN), @r#"
    ✓ cpu agrees over 6 tensors; closest to its limit is d_hidden of cpu: relative error 1.66e-3, 1.01×
      its floor of 1.65e-3 (limit 1.50×).

    dump          dumps/tiny: run run-a, 2 processes, step 0

    ✓ cpu · step 0 ────────────────────────────────────────────────────────────────────────────────────
    computed      portable, float32 throughout; held to the declared contract: dlogits f32, sums f32, dQ
                  bf16, dK bf16
    tokens        512 tokens, 12 masked

        stage                      rel. L2    floor    ratio   │1×  │10× │100×│10³ │10⁴ │10⁵ │10⁶ │10⁷
      ✓ loss                       1.10e-7  1.20e-7    0.92×   ▏
      ✓ lse                        6.00e-8  6.20e-8    0.97×   ▏
      ✓ label_logits               9.00e-8  1.00e-7    0.90×   ▏
      ✓ d_hidden                   1.66e-3  1.65e-3    1.01×   ▏
      ✓ d_unembedding              1.71e-3  1.70e-3    1.01×   ▏
      ✓ accumulated_d_unembedding  1.70e-3  1.70e-3    1.00×   ▏
      ✓ grad_norm                  1.2034 against 1.2031 ± 2.00e-3
    "#);
}

#[test]
fn a_certain_cause() {
    assert_snapshot!(render(&samples::certain(), PLAIN), @r#"
    ✗ recorded diverges at d_unembedding_label (step 0, microbatch 0): relative error 4.41e-3, 2.2e4×
      its floor of 2.00e-7 (limit 1.50×); cause: label gradients are scatter-added into dK in bfloat16
      (label-scatter-bf16, certain, explains >99.9 %).

    dump          dumps/tiny: run run-a, 2 processes, step 0

    ✗ recorded · step 0 ───────────────────────────────────────────────────────────────────────────────
    computed      gradients of the training run; held to the declared contract: dlogits f32, sums f32,
                  dQ bf16, dK bf16
    tokens        512 tokens, 12 masked

        stage                      rel. L2    floor    ratio   │1×  │10× │100×│10³ │10⁴ │10⁵ │10⁶ │10⁷
      ✓ loss                       1.10e-7  1.20e-7    0.92×   ▏
      ✓ lse                        6.00e-8  6.20e-8    0.97×   ▏
      ✓ label_logits               9.00e-8  1.00e-7    0.90×   ▏
      ✗ d_unembedding_label        4.41e-3  2.00e-7   2.2e4×   █████████████████████▊
      ✓ d_hidden                   1.66e-3  1.65e-3    1.01×   ▏
      ✗ d_unembedding              4.50e-3  1.70e-3    2.65×   ██▏
      ✗ accumulated_d_unembedding  4.50e-3  1.70e-3    2.65×   ██▏
      ✗ grad_norm                  1.2030 against 1.0010 ± 2.00e-3

    observed      d_unembedding_label breaks first, in microbatch 0: rel. L2 is 22050 times what honest
                  rounding makes. The error lies in the rows of labels (>99.9 % of its square): vocab
                  ids 3, 17–18, 42, 77 and 2 ranges more. 17 elements beyond what any honest computation
                  gives.
    enters        at d_unembedding_label, 2.2e4× the floor: the label's term, or how it is added to the
                  rows of labels
    inherited     d_unembedding and accumulated_d_unembedding have all of their error from
                  d_unembedding_label (at most 1.01× the floor is left)
    repaired      with the reference's d_unembedding_label: d_unembedding 2.65× → 1.01×,
                  accumulated_d_unembedding 2.65× → 1.01×
    worst         d_unembedding_label, microbatch 0, vocab id 42, feature 3: 1.2345e-3, reference
                  1.2300e-3
                  d_unembedding, microbatch 0, vocab id 42, feature 3: 1.2345e-3, reference 1.2300e-3
                  accumulated_d_unembedding, vocab id 42, feature 3: 1.2345e-3, reference 1.2300e-3

      1. label-scatter-bf16 · certain
      what        label gradients are scatter-added into dK in bfloat16
      explains    >99.9 % of the squared deviation; what is left is 1.02× the floor
      parameters  chunks = 16, order = "token"
      evidence    the error sits in label rows only and grows with the hits per row: 1.6e-3 at one hit,
                  7e-3 at 54
      remedy      add the label part in float32 inside the kernel, or scatter into a float32 buffer and
                  round once
      next best   dk-parts-rounded, which explains 41.0 %

    again         xent-diff dumps/tiny --step 0 --candidate recorded
    "#);
}

#[test]
fn an_unknown_cause() {
    assert_snapshot!(render(&samples::unknown(), PLAIN), @r#"
    ✗ recorded diverges at d_hidden (step 0, microbatch 0): relative error 0.310, 188× its floor of
      1.65e-3 (limit 1.50×); cause unknown. A factor per token, 0.820 to 1.31, on the lse part accounts
      for 99.1 % of it: lse, or its cotangent, as the backward takes them.

    dump          dumps/tiny: run run-a, 2 processes, step 0

    ✗ recorded · step 0 ───────────────────────────────────────────────────────────────────────────────
    computed      gradients of the training run; held to the declared contract: dlogits f32, sums f32,
                  dQ bf16, dK bf16
    tokens        512 tokens, 12 masked

        stage          rel. L2    floor    ratio   │1×  │10× │100×│10³ │10⁴ │10⁵ │10⁶ │10⁷
      ✓ loss           1.10e-7  1.20e-7    0.92×   ▏
      ✓ lse            6.00e-8  6.20e-8    0.97×   ▏
      ✓ label_logits   9.00e-8  1.00e-7    0.90×   ▏
      ✗ d_hidden         0.310  1.65e-3     188×   ███████████▍
      ✓ d_unembedding  1.71e-3  1.70e-3    1.01×   ▏

    observed      d_hidden breaks first, in microbatch 0: the error is above what honest rounding makes.
                  The error lies in some rows (98.0 % of its square), all from token 384 on.
    enters        at d_hidden, 188× the floor, after lse, which agrees: the backward. A factor per
                  token, 0.820 to 1.31, on the lse part accounts for 99.1 % of it: lse, or its
                  cotangent, as the backward takes them
    to split      record d_lse, d_hidden_lse and d_hidden_label
    worst         d_hidden, microbatch 0, vocab id 42, feature 3: 1.2345e-3, reference 1.2300e-3

      1. cause unknown
      what        no catalogued fault explains it
      explains    nothing; the deviation is 188× the floor
      evidence    dQ is off from token 384 on; dK is at its floor
      remedy      look at what the kernel does with the last tokens
      next best   token-tail-dropped, which explains 33.0 %

    again         xent-diff dumps/tiny --step 0 --candidate recorded
    "#);
}

#[test]
fn values_that_are_not_finite() {
    assert_snapshot!(render(&samples::nonfinite(), PLAIN), @r#"
    ✗ cpu diverges at d_hidden (step 0, microbatch 0): max. error 2.50e-4 where the reference is 0;
      cause: dK holds values that are not finite (nonfinite, likely, indistinguishable here from
      dk-accumulate-bf16).

    dump          dumps/tiny: run run-a, 2 processes, step 0

    ✗ cpu · step 0 ────────────────────────────────────────────────────────────────────────────────────
    computed      portable, float32 throughout; held to the declared contract: dlogits f32, sums f32, dQ
                  bf16, dK bf16
    tokens        512 tokens, 12 masked

        stage          rel. L2    floor    ratio   │1×  │10× │100×│10³ │10⁴ │10⁵ │10⁶ │10⁷
      ✓ loss           1.10e-7  1.20e-7    0.92×   ▏
      ✓ lse            6.00e-8  6.20e-8    0.97×   ▏
      ✓ label_logits   9.00e-8  1.00e-7    0.90×   ▏
      ✗ d_hidden             –        0        ∞   ███████████████████████████████████████▸
      ✗ d_unembedding  1.71e-3  1.70e-3    NaN/∞   ! 64 not finite

    observed      d_hidden breaks first, in microbatch 0.
    worst         d_unembedding, microbatch 0, vocab id 7, feature 0: NaN, reference 0.012500

      1. nonfinite · likely
      what        dK holds values that are not finite
      evidence    row 7 of dK is NaN in all 64 features
      remedy      look for an overflow before the gradient product
      or equally  dk-accumulate-bf16
      tell apart  capture the parts of dK, in float32

    again         xent-diff dumps/tiny --step 0 --candidate cpu
    "#);
}

#[test]
fn two_candidates_on_a_narrow_terminal() {
    assert_snapshot!(render(&samples::two_candidates(), Style { colour: false, width: 72 }), @r#"
    ✗ recorded diverges at d_unembedding_label (step 0, microbatch 0):
      relative error 4.41e-3, 2.2e4× its floor of 2.00e-7 (limit 1.50×);
      cause: label gradients are scatter-added into dK in bfloat16
      (label-scatter-bf16, certain, explains >99.9 %). cpu agrees.

    dump          dumps/tiny: run run-a, 2 processes, step 0
    interrupted   proc_00001/step_00000000/mb_0001: no manifest, a capture
                  that was cut off; skipped
    warning       3 shards carry no blake3 checksum: their bytes were not
                  checked

    ✗ recorded · step 0 ───────────────────────────────────────────────────
    computed      gradients of the training run; held to the declared
                  contract: dlogits f32, sums f32, dQ bf16, dK bf16
    tokens        512 tokens, 12 masked

        stage                      rel. L2    floor    ratio   │1×  │10×
      ✓ loss                       1.10e-7  1.20e-7    0.92×   ▏
      ✓ lse                        6.00e-8  6.20e-8    0.97×   ▏
      ✓ label_logits               9.00e-8  1.00e-7    0.90×   ▏
      ✗ d_unembedding_label        4.41e-3  2.00e-7   2.2e4×   █████████▸
      ✓ d_hidden                   1.66e-3  1.65e-3    1.01×   ▏
      ✗ d_unembedding              4.50e-3  1.70e-3    2.65×   ██▏
      ✗ accumulated_d_unembedding  4.50e-3  1.70e-3    2.65×   ██▏
      ✗ grad_norm                  1.2030 against 1.0010 ± 2.00e-3

    observed      d_unembedding_label breaks first, in microbatch 0: rel. L2
                  is 22050 times what honest rounding makes. The error lies
                  in the rows of labels (>99.9 % of its square): vocab ids
                  3, 17–18, 42, 77 and 2 ranges more. 17 elements beyond
                  what any honest computation gives.
    enters        at d_unembedding_label, 2.2e4× the floor: the label's
                  term, or how it is added to the rows of labels
    inherited     d_unembedding and accumulated_d_unembedding have all of
                  their error from d_unembedding_label (at most 1.01× the
                  floor is left)
    repaired      with the reference's d_unembedding_label: d_unembedding
                  2.65× → 1.01×, accumulated_d_unembedding 2.65× → 1.01×
    worst         d_unembedding_label, microbatch 0, vocab id 42, feature 3:
                  1.2345e-3, reference 1.2300e-3
                  d_unembedding, microbatch 0, vocab id 42, feature 3:
                  1.2345e-3, reference 1.2300e-3
                  accumulated_d_unembedding, vocab id 42, feature 3:
                  1.2345e-3, reference 1.2300e-3

      1. label-scatter-bf16 · certain
      what        label gradients are scatter-added into dK in bfloat16
      explains    >99.9 % of the squared deviation; what is left is 1.02×
                  the floor
      parameters  chunks = 16, order = "token"
      evidence    the error sits in label rows only and grows with the hits
                  per row: 1.6e-3 at one hit, 7e-3 at 54
      remedy      add the label part in float32 inside the kernel, or
                  scatter into a float32 buffer and round once
      next best   dk-parts-rounded, which explains 41.0 %

    again         xent-diff dumps/tiny --step 0 --candidate recorded

    ✓ cpu · step 0 ────────────────────────────────────────────────────────
    computed      portable, float32 throughout; held to the declared
                  contract: dlogits f32, sums f32, dQ bf16, dK bf16
    tokens        512 tokens, 12 masked

        stage                      rel. L2    floor    ratio   │1×  │10×
      ✓ loss                       1.10e-7  1.20e-7    0.92×   ▏
      ✓ lse                        6.00e-8  6.20e-8    0.97×   ▏
      ✓ label_logits               9.00e-8  1.00e-7    0.90×   ▏
      ✓ d_hidden                   1.66e-3  1.65e-3    1.01×   ▏
      ✓ d_unembedding              1.71e-3  1.70e-3    1.01×   ▏
      ✓ accumulated_d_unembedding  1.70e-3  1.70e-3    1.00×   ▏
      ✓ grad_norm                  1.2034 against 1.2031 ± 2.00e-3
    "#);
}

#[test]
fn few_microbatches_have_a_column_each() {
    assert_snapshot!(render(&samples::microbatches(3, &[1]), PLAIN), @r#"
    ✗ recorded diverges at d_hidden (step 0, microbatch 1): relative error 0.0400, 24.2× its floor of
      1.65e-3 (limit 1.50×).

    dump          dumps/tiny: run run-a, 2 processes, step 0

    ✗ recorded · step 0 ───────────────────────────────────────────────────────────────────────────────
    computed      gradients of the training run; held to the declared contract: dlogits f32, sums f32,
                  dQ bf16, dK bf16
    tokens        1536 tokens in 3 microbatches, 36 masked

        stage                      rel. L2    floor    ratio    mb 0    mb 1    mb 2   │1×  │10× │100×
      ✓ loss                       1.10e-7  1.20e-7    0.92×   0.92×   0.92×   0.92×   ▏
      ✓ lse                        6.00e-8  6.20e-8    0.97×   0.97×   0.97×   0.97×   ▏
      ✓ label_logits               9.00e-8  1.00e-7    0.90×   0.90×   0.90×   0.90×   ▏
      ✗ d_hidden                    0.0400  1.65e-3    24.2×   1.01×   24.2×   1.01×   ██████▉
      ✓ d_unembedding              1.71e-3  1.70e-3    1.01×   1.01×   1.01×   1.01×   ▏
      ✓ accumulated_d_unembedding  1.70e-3  1.70e-3    1.00×                           ▏

    observed      d_hidden breaks first, in microbatch 1: the error is above what honest rounding makes.
    worst         d_hidden, microbatch 1, vocab id 42, feature 3: 1.2345e-3, reference 1.2300e-3

    again         xent-diff dumps/tiny --step 0 --candidate recorded
    "#);
}

#[test]
fn many_microbatches_show_the_worst() {
    assert_snapshot!(render(&samples::microbatches(16, &[2, 11]), PLAIN), @r#"
    ✗ recorded diverges at d_hidden (step 0, microbatch 2): relative error 0.0600, 36.4× its floor of
      1.65e-3 (limit 1.50×).

    dump          dumps/tiny: run run-a, 2 processes, step 0

    ✗ recorded · step 0 ───────────────────────────────────────────────────────────────────────────────
    computed      gradients of the training run; held to the declared contract: dlogits f32, sums f32,
                  dQ bf16, dK bf16
    tokens        8192 tokens in 16 microbatches, 192 masked

        stage                      rel. L2    floor    ratio  at mb    bad   │1×  │10× │100×│10³ │10⁴
      ✓ loss                       1.10e-7  1.20e-7    0.92×      0   0/16   ▏
      ✓ lse                        6.00e-8  6.20e-8    0.97×      0   0/16   ▏
      ✓ label_logits               9.00e-8  1.00e-7    0.90×      0   0/16   ▏
      ✗ d_hidden                     0.240  1.65e-3     145×     11   2/16   ██████████▉
      ✓ d_unembedding              1.71e-3  1.70e-3    1.01×      0   0/16   ▏
      ✓ accumulated_d_unembedding  1.70e-3  1.70e-3    1.00×           0/1   ▏

    observed      d_hidden breaks first, in microbatch 2: the error is above what honest rounding makes.
    worst         d_hidden, microbatch 11, vocab id 42, feature 3: 1.2345e-3, reference 1.2300e-3

    again         xent-diff dumps/tiny --step 0 --candidate recorded
    "#);
}

#[test]
fn a_folder_of_dumps_ends_in_an_overview() {
    assert_snapshot!(overview(&[samples::agreeing(), samples::certain()], &[], PLAIN), @r#"
    1 of 2 dumps diverges
      ✓ dumps/tiny
      ✗ dumps/tiny  label-scatter-bf16
    "#);
}

#[test]
fn nothing_compared_is_said() {
    let report = samples::report(Vec::new());
    assert_snapshot!(verdict(&report, PLAIN), @"✓ nothing was compared: there is no microbatch that is whole.");
}

#[test]
fn colour_changes_nothing_but_the_attributes() {
    for report in all() {
        let plain = render(&report, PLAIN);
        let coloured = render(&report, Style { colour: true, ..PLAIN });
        assert!(!plain.contains('\x1b'));
        assert!(coloured.contains("\x1b["));
        let mut stripped = String::new();
        let mut parts = coloured.split('\x1b');
        stripped.push_str(parts.next().unwrap());
        parts.for_each(|part| stripped.push_str(part.split_once('m').unwrap().1));
        assert_eq!(stripped, plain);
    }
}

#[test]
fn consequences_are_dimmed_and_the_first_break_is_not() {
    let text = render(&samples::certain(), Style { colour: true, ..PLAIN });
    let line = |stage: &str| text.lines().find(|line| line.contains(stage) && line.contains('×') && line.contains('█')).unwrap();
    assert!(line("d_unembedding_label ").contains("\x1b[1;31md_unembedding_label"));
    assert!(line("accumulated_d_unembedding ").contains("\x1b[2maccumulated_d_unembedding"));
}

#[test]
fn lines_keep_to_the_width() {
    for report in all() {
        for width in [72, 80, 100, 140] {
            let text = render(&report, Style { colour: false, width });
            assert!(longest(&text) <= width, "{width}:\n{text}");
        }
    }
}

#[test]
fn the_first_line_is_the_verdict() {
    for report in all() {
        let first = render(&report, PLAIN).lines().next().unwrap().to_owned();
        assert!(first.starts_with(if report.verdict == Verdict::Agree { "✓ " } else { "✗ " }), "{first}");
    }
}

#[test]
fn a_dump_cannot_steer_the_terminal() {
    let mut report = samples::certain();
    report.dump.path = "dumps/\x1b[2Jx".to_owned();
    report.dump.run_ids = vec!["a\rb".to_owned(), "\x07".to_owned()];
    report.candidates[0].run_id = "a\rb".to_owned();
    report.candidates[0].findings[0].evidence = "line\x1b]0;title\x07".to_owned();
    let text = render(&report, PLAIN);
    assert!(!text.contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
}

#[test]
fn the_command_repeats_the_judgement() {
    let mut report = samples::certain();
    let candidate = &mut report.candidates[0];
    candidate.presence.microbatches = 4;
    candidate.contract.source = "given";
    candidate.sample = Some(SampleReport { token_rows: 64, vocab_rows: 60 });
    let text = render(&report, Style { colour: false, width: 400 });
    let expected = "xent-diff dumps/tiny --step 0 --candidate recorded --microbatch 0 --sample 64 \
                    --contract logits=f32,dlogits=f32,accumulate=f32,d_hidden=bf16,d_unembedding=bf16";
    assert!(text.contains(expected), "{text}");
}
