//! How long the programs take at real shapes, with everything on the device.

use super::cases::{Case, per_token};
use super::machine::Failure;
use super::programs::{Piece, Programs};
use super::report::{Times, Timing};
use crate::pjrt::{Buffer, CompileOptions, Device, Element, HostTensor};
use fused_xent_kernels::problem::Shape;
use fused_xent_kernels::tpu::Generation;
use std::time::Instant;

/// Executions that are timed, after those that are not.
const RUNS: usize = 11;
const WARM_UP: usize = 2;

/// The shapes that are timed.
pub fn shapes(quick: bool, small_device: bool) -> Vec<Shape> {
    let shape = |tokens, hidden, vocab| Shape { tokens, hidden, vocab };
    match (small_device, quick) {
        (true, true) => vec![shape(128, 128, 2048)],
        (true, false) => vec![shape(512, 512, 8192)],
        (false, true) => vec![shape(4096, 1024, 50304)],
        (false, false) => vec![shape(4096, 1024, 50304), shape(8192, 4096, 128256), shape(32768, 2048, 151936)],
    }
}

/// The Mosaic kernels of a chip, if it is one, and beside them the StableHLO program, at one shape.
pub fn time(device: &Device, generation: Option<Generation>, shape: Shape) -> Vec<Timing> {
    let case = Case::real(shape);
    let mosaic = generation.map(|generation| Programs::mosaic(&case, generation).map_err(|e| e.to_string()));
    let all = mosaic.map(|programs| ("mosaic", programs)).into_iter();
    let all = all.chain([("stablehlo", Programs::stablehlo(&case).map_err(str::to_owned))]);
    let row = |program: String, times: Times| {
        let Shape { tokens, hidden, vocab } = shape;
        Timing { shape: [tokens, hidden, vocab], program, times }
    };
    let arguments = match Arguments::new(device, &case) {
        Ok(arguments) => arguments,
        Err(e) => return all.map(|(kind, _)| row(kind.into(), Times::Refused { error: e.to_string() })).collect(),
    };
    let mut timings = vec![];
    for (kind, programs) in all {
        match programs {
            Ok(programs) => timings.extend(programs.pieces.iter().map(|piece| {
                let times = arguments.time(piece, generation);
                row(format!("{kind} {}", piece.pass), times.unwrap_or_else(|e| Times::Refused { error: e.to_string() }))
            })),
            Err(error) => timings.push(row(kind.into(), Times::Refused { error })),
        }
    }
    timings
}

/// What any of the programs takes, on the device.
struct Arguments<'a> {
    device: &'a Device,
    shape: Shape,
    named: Vec<(&'static str, Buffer)>,
}

impl<'a> Arguments<'a> {
    fn new(device: &'a Device, case: &Case) -> Result<Self, Failure> {
        let data = case.data();
        let upload = |name, x: HostTensor| -> Result<_, Failure> { Ok((name, device.upload(x.element, &x.dims, &x.bytes)?)) };
        let g = per_token(data.cotangents[0].as_ref().expect("a training run has it"));
        // Its value makes no difference to the time; this is about that of these logits.
        let lse = per_token(&vec![(case.shape.vocab as f32).ln() + 2.0; case.shape.tokens]);
        let named = vec![
            upload("hidden", data.hidden(case))?,
            upload("unembedding", data.unembedding(case))?,
            upload("labels", data.labels(case))?,
            upload("cotangent", g.clone())?,
            upload("loss_cotangent", g)?,
            upload("lse", lse)?,
        ];
        Ok(Self { device, shape: case.shape, named })
    }

    fn time(&self, piece: &Piece, generation: Option<Generation>) -> Result<Times, Failure> {
        let began = Instant::now();
        let compiled = self.device.compile(&piece.text, &CompileOptions::default())?;
        let compile_seconds = began.elapsed().as_secs_f64();
        let mut arguments = vec![];
        for (name, ty) in &piece.inputs {
            let (_, buffer) = self
                .named
                .iter()
                .find(|(known, _)| known == name)
                .ok_or_else(|| format!("argument {name}: nothing has that name"))?;
            debug_assert_eq!(Element::by_name(ty.element), buffer.element().ok());
            arguments.push(buffer);
        }
        let mut times = vec![];
        for _ in 0..WARM_UP + RUNS {
            let began = Instant::now();
            compiled.execute(&arguments)?;
            times.push(began.elapsed().as_secs_f64());
        }
        let mut times = times.split_off(WARM_UP);
        times.sort_by(f64::total_cmp);
        let median = times[RUNS / 2];
        let Shape { tokens, hidden, vocab } = self.shape;
        let products = match piece.pass {
            "forward" => 1.0,
            "backward" => 3.0,
            _ => 4.0,
        };
        let operations = 2.0 * products * tokens as f64 * hidden as f64 * vocab as f64;
        let least = |chip: Generation| chip.mxu_cycles(operations) / (chip.cores() as f64 * chip.clock());
        Ok(Times::Measured {
            runs: RUNS,
            median_ms: median * 1e3,
            least_ms: times[0] * 1e3,
            most_ms: times[RUNS - 1] * 1e3,
            tflop_per_s: operations / median / 1e12,
            share_of_mxu: generation.map(|chip| least(chip) / median),
            compile_seconds,
        })
    }
}
