//! The loss that a manifest describes, as the kernels' types.

use super::error::{DumpError, DumpErrorKind};
use super::json::Members;
use fused_xent_kernels::problem::LossOptions;
use fused_xent_kernels::reduction::{Denominator, Microbatches, Reduction, StepReduction};
use serde_json::{Map, Value, json};

/// Whether the gradients recorded in `mb_*` carry the step's factor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MicrobatchGradients {
    /// They are those of the microbatch's own loss, without the step's 1 / num_microbatches.
    #[default]
    Own,
    /// They carry the step's factor already.
    Step,
}

/// Everything between logits and the step's loss. The default is a manifest's with an empty `loss`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSettings {
    /// What changes a logit or a per-token loss.
    pub options: LossOptions,
    /// How the per-token losses add up.
    pub reduction: StepReduction,
    /// What the gradients recorded per microbatch carry.
    pub microbatch_gradients: MicrobatchGradients,
}

const REDUCTIONS: [(&str, Reduction); 2] = [("mean", Reduction::Mean), ("sum", Reduction::Sum)];
const DENOMINATORS: [(&str, Denominator); 2] = [("valid", Denominator::Valid), ("tokens", Denominator::Tokens)];
const MICROBATCHES: [(&str, Microbatches); 3] =
    [("mean", Microbatches::Mean), ("sum", Microbatches::Sum), ("global", Microbatches::Global)];
const GRADIENTS: [(&str, MicrobatchGradients); 2] = [("own", MicrobatchGradients::Own), ("step", MicrobatchGradients::Step)];

const MEMBERS: [&str; 11] = [
    "reduction",
    "denominator",
    "microbatches",
    "cotangent",
    "microbatch_gradients",
    "ignore_index",
    "valid_vocab",
    "logit_scale",
    "logit_softcap",
    "z_loss",
    "label_smoothing",
];

fn word_of<T: PartialEq>(words: &[(&'static str, T)], value: &T) -> Option<&'static str> {
    words.iter().find(|(_, v)| v == value).map(|(word, _)| *word)
}

impl LossSettings {
    /// The `loss` member of a manifest; members left out are the defaults. `place` says where it stands, for errors.
    ///
    /// # Errors
    /// An unknown member, or a value that makes no sense.
    pub fn from_json(value: &Value, place: &str) -> Result<Self, DumpError> {
        let members = Members::new(value, place, &MEMBERS)?;
        let mut settings = Self::default();
        let Self { options, reduction, microbatch_gradients } = &mut settings;
        reduction.reduction = members.word("reduction", &REDUCTIONS)?.unwrap_or_default();
        reduction.microbatches = members.word("microbatches", &MICROBATCHES)?.unwrap_or_default();
        *microbatch_gradients = members.word("microbatch_gradients", &GRADIENTS)?.unwrap_or_default();
        if let Some(value) = members.get("denominator") {
            let word = DENOMINATORS.iter().find(|(word, _)| value.as_str() == Some(word)).map(|(_, meaning)| *meaning);
            reduction.denominator = word
                .or(value.as_f64().map(Denominator::Given))
                .ok_or_else(|| members.wrong("denominator", "\"valid\", \"tokens\" or a number above 0"))?;
        }
        let number = |name, slot: &mut f64| match members.get(name) {
            Some(value) => members.number(name, value).map(|x| *slot = x),
            None => Ok(()),
        };
        number("cotangent", &mut reduction.cotangent)?;
        number("logit_scale", &mut options.logit_scale)?;
        number("z_loss", &mut options.z_loss)?;
        number("label_smoothing", &mut options.label_smoothing)?;
        if let Some(value) = members.get("ignore_index") {
            options.ignore_index = value.as_i64().ok_or_else(|| members.wrong("ignore_index", "a 64-bit integer"))?;
        }
        if let Some(value) = members.nullable("valid_vocab") {
            options.valid_vocab = Some(members.count("valid_vocab", value)?);
        }
        if let Some(value) = members.nullable("logit_softcap") {
            options.logit_softcap = Some(members.number("logit_softcap", value)?);
        }
        settings.validate(place, DumpErrorKind::Value)?;
        Ok(settings)
    }

    pub(crate) fn validate(&self, place: &str, kind: DumpErrorKind) -> Result<(), DumpError> {
        self.options.validate().and(self.reduction.validate()).map_err(|e| {
            DumpError::new(kind, place, e.to_string(), "a loss that can be computed", "correct the member").caused_by(e)
        })
    }

    /// The `loss` member of a manifest that says this, every member spelled out.
    pub fn to_json(&self) -> Value {
        let Self { options, reduction, microbatch_gradients } = self;
        let denominator = match reduction.denominator {
            Denominator::Given(number) => json!(number),
            ref word => json!(word_of(&DENOMINATORS, word)),
        };
        let members = [
            ("reduction", json!(word_of(&REDUCTIONS, &reduction.reduction))),
            ("denominator", denominator),
            ("microbatches", json!(word_of(&MICROBATCHES, &reduction.microbatches))),
            ("cotangent", json!(reduction.cotangent)),
            ("microbatch_gradients", json!(word_of(&GRADIENTS, microbatch_gradients))),
            ("ignore_index", json!(options.ignore_index)),
            ("valid_vocab", json!(options.valid_vocab)),
            ("logit_scale", json!(options.logit_scale)),
            ("logit_softcap", json!(options.logit_softcap)),
            ("z_loss", json!(options.z_loss)),
            ("label_smoothing", json!(options.label_smoothing)),
        ];
        Value::Object(members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<Map<_, _>>())
    }
}
