//! Errors planted in the text: the comparison refuses each of them, so it would have found one that was made. Tests of each executor.

use super::run::Run;
use super::suite::*;
use fused_xent_kernels::Dlogits;
use fused_xent_kernels::problem::{DType, LossOptions};
use fused_xent_kernels::tpu::{BackwardPlan, Form, Program, Tile};

const TILE: Tile = Tile { tokens: 128, vocab: 128 };
const ONE_PASS: BackwardPlan = BackwardPlan { tile: TILE, form: Form::OnePass { at_once: 512, cores: 1 } };

/// Several tiles each way, the last of them ragged.
fn run() -> Run {
    let options = LossOptions { z_loss: 1e-2, ..LossOptions::default() };
    let case = Recipe { dtypes: [DType::Bf16; 2], options, ..Recipe::plain(490, 64, 500) }.case();
    Run::new(case, [DType::F32; 2], Dlogits::Bf16x2)
}

/// The program with its kernel's text edited; the edit must change it.
fn edited(program: &Program, edit: impl FnOnce(&str) -> String) -> String {
    let [(_, kernel)] = &program.kernels[..] else { panic!("one kernel") };
    let planted = edit(kernel);
    assert_ne!(&planted, kernel, "the edit found nothing");
    let [from, to] = [kernel, &planted].map(|text| base64(text));
    program.text.replace(&from, &to)
}

fn base64(text: &str) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = text.bytes().flat_map(|byte| (0..8).rev().map(move |i| byte >> i & 1)).collect();
    let digits = bits.chunks(6).map(|six| (0..6).fold(0, |digit, i| digit << 1 | six.get(i).copied().unwrap_or(0)));
    let mut out: String = digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect();
    out.extend(std::iter::repeat_n('=', (4 - out.len() % 4) % 4));
    out
}

fn is_refused(verdicts: &[(&str, Verdict)]) -> bool {
    verdicts.iter().any(|(_, verdict)| !verdict.honest())
}

#[track_caller]
fn refused_forward(edit: impl FnOnce(&str) -> String) {
    let run = run();
    let program = run.forward_program(TILE);
    let verdicts = run.truth().judge_forward(&run.forward(&edited(&program, edit)));
    assert!(is_refused(&verdicts), "{verdicts:?}");
}

#[track_caller]
fn refused_backward(edit: impl FnOnce(&str) -> String) {
    let run = run();
    let forward = run.forward(&run.forward_program(TILE).text);
    let [d_hidden, d_unembedding] = run.backward(&edited(&run.backward_program(ONE_PASS), edit), &forward.lse, None);
    let verdicts = run.truth().judge(&run.case, &Results { forward, d_hidden, d_unembedding });
    assert!(is_refused(&verdicts), "{verdicts:?}");
}

/// Does `edit` to the first line after `from` that has all of `words`.
fn line_with(text: &str, from: &str, words: &[&str], edit: impl FnOnce(&str) -> String) -> String {
    let start = text.find(from).unwrap_or_else(|| panic!("no {from}"));
    let mut edit = Some(edit);
    let rest: Vec<String> = text[start..]
        .lines()
        .map(|line| match words.iter().all(|word| line.contains(word)) {
            true => edit.take().map_or_else(|| line.to_owned(), |edit| edit(line)),
            false => line.to_owned(),
        })
        .collect();
    format!("{}{}\n", &text[..start], rest.join("\n"))
}

/// The last sum before the first store after `from`, kept in bfloat16.
fn narrowed(text: &str, from: &str, ty: &str) -> String {
    line_with(text, from, &["arith.addf", ty], |line| {
        let (name, operation) = line.trim().split_once(" = ").unwrap();
        let bf16 = ty.replace("f32", "bf16");
        format!(
            "    %wide = {operation}\n    %narrow = \"stable_mosaic.arith.truncf\"(%wide) : ({ty}) -> {bf16}\n    \
             {name} = \"stable_mosaic.arith.extf\"(%narrow) : ({bf16}) -> {ty}"
        )
    })
}

pub fn nothing_planted_nothing_refused() {
    let run = run();
    let results = run.both(&run.forward_program(TILE).text, &run.backward_program(ONE_PASS).text);
    let verdicts = run.truth().judge(&run.case, &results);
    assert!(!is_refused(&verdicts), "{verdicts:?}");
}

pub fn an_unmasked_tail() {
    // 500 vocab ids are 62 groups of eight, and 4.
    refused_forward(|text| text.replace("dense<4> : vector<8x128xi32>", "dense<8> : vector<8x128xi32>"));
    refused_backward(|text| text.replace("value = 500 : i32", "value = 512 : i32"));
}

/// A tile leaves its last logits to the next; ahead of the first there are none.
pub fn logits_from_before_the_first_tile() {
    refused_forward(|text| {
        let of_start = "(vector<8x128xi32>, vector<8x128xi32>)";
        line_with(text, "scf.if", &["arith.cmpi", "predicate = 4", of_start], |line| {
            line.replace("predicate = 4", "predicate = 5")
        })
    });
}

/// 0·NaN is NaN: that s is 0 there is not enough.
pub fn a_tail_of_k_that_is_not_zeroed() {
    refused_backward(|text| {
        line_with(text, "scf.if", &["arith.select", "vector<128x64xbf16>"], |line| {
            let operands = line.split(['(', ')']).nth(1).unwrap();
            let k = operands.split(", ").nth(1).unwrap();
            line.replace(operands, &operands.replace(operands.rsplit(", ").next().unwrap(), k))
        })
    });
}

/// The sums start where the first tile's do, and are not cleared for the next.
pub fn a_missing_reset() {
    let only_at_the_start = |text: &str, own: &str, other: &str| {
        line_with(text, "^bb0", &["arith.cmpi", &format!("({own},"), "predicate = 0"], |line| {
            format!(
                "    %both = \"stable_mosaic.arith.addi\"({own}, {other}) : (i32, i32) -> i32\n{}",
                line.replace(&format!("({own},"), "(%both,")
            )
        })
    };
    refused_forward(|text| only_at_the_start(text, "%step1", "%step0"));
    refused_backward(|text| only_at_the_start(text, "%step2", "%step1"));
    refused_backward(|text| only_at_the_start(text, "%step1", "%step2"));
}

pub fn a_wrong_transform() {
    let place = |text: &str, window: usize, from: &str, to: &str| {
        let end = text.find(&format!("sym_name = \"place{window}\"")).unwrap();
        let start = text[..end].rfind("\"stable_mosaic.func.return\"").unwrap();
        format!("{}{}{}", &text[..start], text[start..end].replacen(from, to, 1), &text[end..])
    };
    // Q, K, the labels, the loss.
    refused_forward(|text| place(text, 0, "(%step0, ", "(%step1, "));
    refused_forward(|text| place(text, 1, "(%step1, ", "(%step0, "));
    refused_forward(|text| place(text, 2, ", %step0)", ", %step1)"));
    // Q, the lse.
    refused_backward(|text| place(text, 0, "(%step2, ", "(%step1, "));
    refused_backward(|text| place(text, 3, ", %step2)", ", %step1)"));
}

/// sᵀ·Q where s·Q is meant, and the other way round.
pub fn a_transposed_product() {
    let [as_it_is, transposed] = ["[1], [0], [0], [1], [0, 0, 1, 1]", "[0], [0], [1], [1], [0, 1, 1, 1]"];
    refused_backward(|text| text.replace(as_it_is, transposed));
    refused_backward(|text| text.replace(transposed, as_it_is));
}

pub fn a_bfloat16_accumulator() {
    // Σ exp in the forward, dK and dQ in the backward.
    refused_forward(|text| narrowed(text, "math.exp", "vector<8x128xf32>"));
    refused_backward(|text| narrowed(text, "[1], [0], [0], [1]", "vector<128x64xf32>"));
    refused_backward(|text| narrowed(text, "[0], [0], [1], [1]", "vector<128x64xf32>"));
}

/// Without its precision a product of float32 is one of bfloat16.
pub fn products_of_float32_in_bfloat16() {
    let case = Recipe::plain(200, 64, 300).case();
    let run = Run::new(case, [DType::F32; 2], Dlogits::F32);
    let program = run.forward_program(TILE);
    let imprecise = edited(&program, |text| text.replace(", precision = #tpu.contract_precision<fp32>", ""));
    assert!(is_refused(&run.truth().judge_forward(&run.forward(&imprecise))));
}

/// What does not fit its window or its array is found where it happens: a block that lies outside, and a slice.
pub fn what_lies_outside(block: &str, slice: &str) {
    let run = run();
    let says = |words: &str, edit: fn(&str) -> String| {
        let text = edited(&run.forward_program(TILE), edit);
        let panic = std::panic::catch_unwind(|| run.forward(&text)).expect_err("it lies outside");
        let message = panic.downcast_ref::<String>().expect("a message");
        assert!(message.contains(words), "{message}");
    };
    says(block, |text| text.replace("array<i64: 4, 4>", "array<i64: 4, 5>"));
    says(block, |text| text.replace("array<i64: 4, 4>", "array<i64: 5, 4>"));
    says(slice, |text| text.replace("offsets = [120, 0]", "offsets = [124, 0]"));
}
