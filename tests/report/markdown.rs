use crate::samples;
use fused_xent::report::markdown::render;
use insta::assert_snapshot;

#[test]
fn a_certain_cause() {
    assert_snapshot!(render(&[samples::two_candidates()], &[]), @r#"
    ### ❌ recorded diverges at d_unembedding_label (step 0, microbatch 0): relative error 4.41e-3, 2.2e4× its floor of 2.00e-7 (limit 1.50×); cause: label gradients are scatter-added into dK in bfloat16 (label-scatter-bf16, certain, explains >99.9 %). cpu agrees.

    `dumps/tiny` · run run-a, 2 processes, step 0

    Interrupted capture, skipped: `proc_00001/step_00000000/mb_0001`

    > Warning: 3 shards carry no blake3 checksum: their bytes were not checked

    #### ❌ recorded · step 0

    | | stage | rel. L2 | floor | ratio | diverges in |
    |---|---|--:|--:|--:|---|
    | ✅ | `loss` | 1.10e-7 | 1.20e-7 | 0.92× |  |
    | ✅ | `lse` | 6.00e-8 | 6.20e-8 | 0.97× |  |
    | ✅ | `label_logits` | 9.00e-8 | 1.00e-7 | 0.90× |  |
    | ❌ | `d_unembedding_label` | 4.41e-3 | 2.00e-7 | **2.2e4×** | microbatch 0 |
    | ✅ | `d_hidden` | 1.66e-3 | 1.65e-3 | 1.01× |  |
    | ❌ | `d_unembedding` | 4.50e-3 | 1.70e-3 | 2.65× | microbatch 0 |
    | ❌ | `accumulated_d_unembedding` | 4.50e-3 | 1.70e-3 | 2.65× | the step |
    | ❌ | `grad_norm` | | | | 1.2030 against 1.0010 ± 2.00e-3 |

    - enters: at d_unembedding_label, 2.2e4× the floor: the label's term, or how it is added to the rows of labels
    - inherited: d_unembedding and accumulated_d_unembedding have all of their error from d_unembedding_label (at most 1.01× the floor is left)
    - repaired: with the reference's d_unembedding_label: d_unembedding 2.65× → 1.01×, accumulated_d_unembedding 2.65× → 1.01×

    **1. label gradients are scatter-added into dK in bfloat16**: `label-scatter-bf16` (certain, explains >99.9 %)

    - parameters: chunks = 16, order = "token"
    - remedy: add the label part in float32 inside the kernel, or scatter into a float32 buffer and round once

    <details><summary>Evidence</summary>

    - explains: &gt;99.9 % of the squared deviation; what is left is 1.02× the floor
    - evidence: the error sits in label rows only and grows with the hits per row: 1.6e-3 at one hit, 7e-3 at 54
    - next best: dk-parts-rounded, which explains 41.0 %

    </details>

    <details><summary>Where it lies, and how to reproduce it</summary>

    d_unembedding_label breaks first, in microbatch 0: rel. L2 is 22050 times what honest rounding makes. The error lies in the rows of labels (>99.9 % of its square): vocab ids 3, 17–18, 42, 77 and 2 ranges more. 17 elements beyond what any honest computation gives.

    | stage | microbatch | worst element | candidate | reference |
    |---|---|---|--:|--:|
    | `d_unembedding_label` | 0 | vocab id 42, feature 3 | 1.2345e-3 | 1.2300e-3 |
    | `d_unembedding` | 0 | vocab id 42, feature 3 | 1.2345e-3 | 1.2300e-3 |
    | `accumulated_d_unembedding` | step | vocab id 42, feature 3 | 1.2345e-3 | 1.2300e-3 |

    gradients of the training run; held to the declared contract: dlogits f32, sums f32, dQ bf16, dK bf16

    512 tokens, 12 masked

    ```sh
    xent-diff dumps/tiny --step 0 --candidate recorded
    ```

    </details>

    <details><summary>✅ cpu · step 0</summary>

    | | stage | rel. L2 | floor | ratio | diverges in |
    |---|---|--:|--:|--:|---|
    | ✅ | `loss` | 1.10e-7 | 1.20e-7 | 0.92× |  |
    | ✅ | `lse` | 6.00e-8 | 6.20e-8 | 0.97× |  |
    | ✅ | `label_logits` | 9.00e-8 | 1.00e-7 | 0.90× |  |
    | ✅ | `d_hidden` | 1.66e-3 | 1.65e-3 | 1.01× |  |
    | ✅ | `d_unembedding` | 1.71e-3 | 1.70e-3 | 1.01× |  |
    | ✅ | `accumulated_d_unembedding` | 1.70e-3 | 1.70e-3 | 1.00× |  |
    | ✅ | `grad_norm` | | | | 1.2034 against 1.2031 ± 2.00e-3 |

    portable, float32 throughout; held to the declared contract: dlogits f32, sums f32, dQ bf16, dK bf16

    512 tokens, 12 masked

    </details>
    "#);
}

#[test]
fn several_dumps_are_folded_under_a_table() {
    let text = render(&[samples::agreeing(), samples::certain()], &["dumps/old"]);
    let table: String = text.lines().take(7).fold(String::new(), |text, line| text + line + "\n");
    assert_snapshot!(table, @r#"
    ### 1 of 2 dumps diverges

    | | dump | causes |
    |---|---|---|
    | ✅ | `dumps/tiny` |  |
    | ❌ | `dumps/tiny` | label-scatter-bf16 |
    | | `dumps/old` | not judged any more |
    "#);
    assert_eq!(text.matches("<details>").count(), text.matches("</details>").count());
    assert_eq!(text.matches("<details><summary>✅ <code>dumps/tiny</code></summary>").count(), 1);
}

/// `line` without characters that a backslash stands before.
fn without_escaped(line: &str) -> String {
    let mut characters = line.chars();
    let mut out = String::new();
    while let Some(c) = characters.next() {
        if c == '\\' { _ = characters.next() } else { out.push(c) }
    }
    out
}

#[test]
fn what_a_dump_says_is_no_markup() {
    let attack = "<img src=x>|*b* _i_ [l](http://x) `c` @team #1 \n# h\n\n| x |";
    let mut report = samples::certain();
    report.dump.path = attack.to_owned();
    report.dump.run_ids = vec![attack.to_owned()];
    report.warnings = vec![attack.to_owned()];
    let candidate = &mut report.candidates[0];
    candidate.candidate = attack.to_owned();
    candidate.description = attack.to_owned();
    candidate.microbatches[0].tensors[3].name = attack.to_owned();
    candidate.microbatches[0].tensors[3].worst.as_mut().unwrap().place = attack.to_owned();
    candidate.first_divergence.as_mut().unwrap().stage = attack.to_owned();
    let finding = &mut candidate.findings[0];
    for words in [&mut finding.cause, &mut finding.title, &mut finding.evidence, &mut finding.remedy] {
        *words = attack.to_owned();
    }
    let text = render(&[report.clone(), report], &[attack]);
    let outside_code = |line: &str| line.split('`').step_by(2).collect::<String>();
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        let open = outside_code(&without_escaped(line));
        assert!(!open.contains("<img") && !open.contains("@team"), "{line}");
        // What begins with a tag is HTML to its end.
        assert!(line.starts_with("<details>") || !open.replace("**", "").contains(['[', '*']), "{line}");
        assert!(!line.starts_with("# ") && !line.starts_with("| x"), "{line}");
    }
    let columns = |line: &str| line.replace("\\|", "").matches('|').count();
    for line in text.lines().filter(|line| line.starts_with("| ❌")) {
        assert!([4, 7].contains(&columns(line)), "{line}");
    }
}
