//! What a program says, word for word. What programs compute is held to the oracle where there is a device to run them on: by the
//! tests of the PJRT runtime.

use fused_xent_kernels::problem::{DType, Layout, LossOptions, Shape};
use fused_xent_kernels::stablehlo::{Spec, naive};

#[test]
fn the_text_is_this() {
    let spec = Spec {
        shape: Shape { tokens: 2, hidden: 3, vocab: 5 },
        layout: Layout::Vd,
        inputs: [DType::Bf16; 2],
        gradients: [DType::Bf16; 2],
        options: LossOptions::default(),
        bf16_logits: false,
        bf16_dlogits: true,
    };
    let text = naive(&spec).text;
    assert_eq!(text, include_str!("naive.mlir"), "{text}");
}
