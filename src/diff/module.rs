//! A StableHLO module that the user exported: its signature, read from its text, and which argument and result is what.
//!
//! ```text
//! func.func public @main(%arg0: tensor<8x16xbf16> {…} loc("hidden"), …) -> (tensor<f32> {jax.result_info = "result[0]"}, …)
//! ```

use crate::pjrt::Element;
use std::fmt;
use std::path::Path;

/// A module that can be run on one device.
#[derive(Clone, Debug)]
pub struct Module {
    /// For one device.
    pub text: String,
    /// What `@main` takes.
    pub arguments: Vec<(Parameter, Argument)>,
    /// What it gives; `None` is not looked at.
    pub results: Vec<(Parameter, Option<Outcome>)>,
}

/// An argument or a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Where the module says.
    pub name: Option<String>,
    /// Of its elements.
    pub element: Element,
    /// Its dimensions.
    pub dims: Vec<usize>,
}

impl fmt::Display for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor<")?;
        self.dims.iter().try_for_each(|dim| write!(f, "{dim}x"))?;
        write!(f, "{}>", self.element.name())?;
        self.name.as_ref().map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

/// What an argument is fed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Argument {
    Hidden,
    Unembedding,
    /// As captured.
    Targets,
    /// Vocab ids, −1 where masked.
    Labels,
    TokenWeights,
    /// g, per token.
    Cotangent,
}

impl Argument {
    const ALL: [(&str, Argument); 6] = [
        ("hidden", Argument::Hidden),
        ("unembedding", Argument::Unembedding),
        ("targets", Argument::Targets),
        ("labels", Argument::Labels),
        ("token_weights", Argument::TokenWeights),
        ("cotangent", Argument::Cotangent),
    ];
    /// Where names do not say.
    const BY_POSITION: [Argument; 4] = [Argument::Hidden, Argument::Unembedding, Argument::Targets, Argument::TokenWeights];

    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, argument)| *argument == self).map_or("", |(name, _)| name)
    }
}

/// What a result is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Loss,
    Lse,
    LabelLogits,
    DHidden,
    DUnembedding,
}

const OUTCOMES: [(&str, Outcome); 5] = [
    ("loss", Outcome::Loss),
    ("lse", Outcome::Lse),
    ("label_logits", Outcome::LabelLogits),
    ("d_hidden", Outcome::DHidden),
    ("d_unembedding", Outcome::DUnembedding),
];

/// What a module must be like.
pub const EXPECTED: &str = "a module of StableHLO text with @main(hidden, unembedding, targets[, token_weights]) -> (loss, (d_hidden, \
    d_unembedding)), as jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(…).as_text() gives it (docs/pjrt.md)";

impl Module {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// What is wrong with it, in one message.
    pub fn read(path: &Path) -> Result<Self, String> {
        let place = path.display();
        let bytes = std::fs::read(path).map_err(|e| format!("{place}: cannot be read: {e}; expected {EXPECTED}"))?;
        let text = String::from_utf8(bytes).map_err(|_| format!("{place}: is no text; expected {EXPECTED}"))?;
        Self::parse(&text).map_err(|found| format!("{place}: {found}; expected {EXPECTED}"))
    }

    /// Reads the text of a module.
    ///
    /// # Errors
    /// What was found that does not fit.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = for_one_device(text)?;
        let (arguments, results) = signature(&text)?;
        let arguments = settle_arguments(arguments)?;
        let results = settle_results(results, &arguments)?;
        Ok(Self { text, arguments, results })
    }
}

fn settle_arguments(parameters: Vec<Parameter>) -> Result<Vec<(Parameter, Argument)>, String> {
    let by_name = |parameter: &Parameter| {
        let name = parameter.name.as_deref()?;
        Argument::ALL.iter().find(|(known, _)| *known == name).map(|(_, argument)| *argument)
    };
    let named: Option<Vec<Argument>> = parameters.iter().map(by_name).collect();
    let count = parameters.len();
    let settled = named.unwrap_or_else(|| Argument::BY_POSITION.into_iter().take(count).collect());
    let has = |wanted| settled.contains(&wanted);
    let twice = (1..settled.len()).any(|i| settled[..i].contains(&settled[i]));
    let needed = has(Argument::Hidden) && has(Argument::Unembedding) && (has(Argument::Targets) || has(Argument::Labels));
    if settled.len() != count || twice || !needed {
        return Err(format!("@main takes {}", list(&parameters)));
    }
    // A name that is known says where the argument is not, even where others have names that are not.
    let elsewhere = |(parameter, argument): &(&Parameter, &Argument)| by_name(parameter).is_some_and(|known| known != **argument);
    if let Some((parameter, argument)) = parameters.iter().zip(&settled).find(elsewhere) {
        let names = "either all arguments have known names, or each stands in its place";
        return Err(format!("@main takes {}: {parameter} stands where {} does; {names}", list(&parameters), argument.name()));
    }
    for (parameter, argument) in parameters.iter().zip(&settled) {
        let fits = match argument {
            Argument::Hidden | Argument::Unembedding => matches!(parameter.element, Element::Bf16 | Element::F16 | Element::F32),
            Argument::Targets | Argument::Labels => matches!(parameter.element, Element::I32 | Element::I64),
            Argument::TokenWeights | Argument::Cotangent => parameter.element == Element::F32,
        };
        if !fits {
            return Err(format!("@main takes {parameter} as {}", argument.name()));
        }
    }
    Ok(parameters.into_iter().zip(settled).collect())
}

fn settle_results(
    parameters: Vec<Parameter>,
    arguments: &[(Parameter, Argument)],
) -> Result<Vec<(Parameter, Option<Outcome>)>, String> {
    let dims_of = |wanted| arguments.iter().find(|(_, argument)| *argument == wanted).map(|(parameter, _)| &parameter.dims);
    let shaped = [(Outcome::DHidden, dims_of(Argument::Hidden)), (Outcome::DUnembedding, dims_of(Argument::Unembedding))];
    // By name, as a word in what JAX says of the result: result['d_hidden'].
    let by_name = |parameter: &Parameter| {
        let name = parameter.name.as_deref()?;
        let words = || name.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        OUTCOMES.iter().find(|(known, _)| words().any(|word| word == *known)).map(|(_, outcome)| *outcome)
    };
    let float = |parameter: &Parameter| matches!(parameter.element, Element::Bf16 | Element::F16 | Element::F32 | Element::F64);
    let named = parameters.iter().any(|parameter| by_name(parameter).is_some());
    let mut settled: Vec<Option<Outcome>> = Vec::new();
    for parameter in &parameters {
        let by_shape = || {
            let fits = |(outcome, dims): &&(Outcome, Option<&Vec<usize>>)| {
                !settled.contains(&Some(*outcome)) && *dims == Some(&parameter.dims) && float(parameter)
            };
            shaped.iter().find(fits).map(|(outcome, _)| *outcome)
        };
        let outcome = if named { by_name(parameter) } else { by_shape() };
        // The loss of the whole microbatch is a number that no stage has.
        settled.push(outcome.filter(|_| !parameter.dims.is_empty()));
    }
    let gradients = [Outcome::DHidden, Outcome::DUnembedding];
    let of_shape = |parameter: &Parameter, outcome: &Option<Outcome>| {
        shaped.iter().all(|(wanted, dims)| *outcome != Some(*wanted) || (*dims == Some(&parameter.dims) && float(parameter)))
    };
    let unfit = parameters.iter().zip(&settled).any(|(parameter, outcome)| !of_shape(parameter, outcome));
    if unfit || !gradients.iter().any(|&gradient| settled.contains(&Some(gradient))) {
        return Err(format!(
            "@main gives {}, none of which is d_hidden or d_unembedding by its name or shape",
            list(&parameters)
        ));
    }
    Ok(parameters.into_iter().zip(settled).collect())
}

fn list(parameters: &[Parameter]) -> String {
    let all: Vec<String> = parameters.iter().map(Parameter::to_string).collect();
    if all.is_empty() { "nothing".into() } else { all.join(", ") }
}

/// The module without what spreads it over devices: meshes, shardings, the number of partitions. What it computes stays the same,
/// unless it computes on the parts themselves.
fn for_one_device(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|line| !line.trim_start().starts_with("sdy.mesh ")) {
        let mut line = line.to_owned();
        for attribute in ["sdy.sharding = #sdy.sharding", "mhlo.sharding = "] {
            while let Some(start) = line.find(attribute) {
                let value = start + attribute.len();
                let end = value + length_of_value(&line[value..]).ok_or("an attribute that does not end")?;
                // With the comma that parted it from its neighbour.
                let after = line[end..].strip_prefix(", ").map_or(end, |rest| line.len() - rest.len());
                let start = if after == end && line[..start].ends_with(", ") { start - 2 } else { start };
                line.replace_range(start..after, "");
            }
        }
        if let Some(at) = line.find("mhlo.num_partitions = ") {
            let digits = at + "mhlo.num_partitions = ".len();
            let end = line[digits..].find(|c: char| !c.is_ascii_digit()).map_or(line.len(), |n| digits + n);
            line.replace_range(digits..end, "1");
        }
        const CONSTRAINT: &str = "sdy.sharding_constraint ";
        if let Some(at) = line.find(CONSTRAINT) {
            let operand = at + CONSTRAINT.len();
            let start = line[operand..].find('<').map(|n| operand + n).ok_or("a sharding_constraint without a sharding")?;
            let end = start + length_of_value(&line[start..]).ok_or("a sharding that does not end")?;
            line.replace_range(start..end, "");
            line.replace_range(at..operand, "stablehlo.optimization_barrier ");
        }
        let parts = ["sdy.", "stablehlo.all_reduce", "stablehlo.all_gather", "stablehlo.reduce_scatter", "@SPMDFullToShardShape"];
        if let Some(part) = parts.iter().find(|part| line.contains(**part)) {
            return Err(format!("it is for several devices: {:?} has {part}", line.trim()));
        }
        out.push_str(&line);
        out.push('\n');
    }
    Ok(out)
}

/// Bytes of the `<…>`, `{…}`, `(…)`, `[…]` or `"…"` that `text` begins with.
fn length_of_value(text: &str) -> Option<usize> {
    let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ if quoted => {}
            '<' | '{' | '(' | '[' => depth += 1,
            '>' | '}' | ')' | ']' => depth = depth.checked_sub(1)?,
            _ => {}
        }
        if depth == 0 && !quoted {
            return Some(i + c.len_utf8());
        }
    }
    None
}

/// Arguments and results of `@main`.
fn signature(text: &str) -> Result<(Vec<Parameter>, Vec<Parameter>), String> {
    let without = || "it has no public function @main".to_owned();
    let heads = ["func.func public @main", "func.func @main"];
    let list = heads.iter().find_map(|head| Some(text.find(&format!("{head}("))? + head.len())).ok_or_else(without)?;
    let end = list + length_of_value(&text[list..]).ok_or_else(without)?;
    let arguments = parameters(&text[list + 1..end - 1])?;
    let Some(rest) = text[end..].trim_start().strip_prefix("->") else { return Ok((arguments, vec![])) };
    let rest = rest.trim_start();
    let results = if rest.starts_with('(') {
        let end = length_of_value(rest).ok_or_else(without)?;
        parameters(&rest[1..end - 1])?
    } else {
        let end = rest.find('>').ok_or_else(without)?;
        parameters(&rest[..=end])?
    };
    Ok((arguments, results))
}

/// `%name: tensor<…> {…} loc(…)`, with or without the name, the attributes and the place, parted by commas.
fn parameters(text: &str) -> Result<Vec<Parameter>, String> {
    let mut parts = Vec::new();
    let (mut rest, mut part) = (text, 0);
    while part < rest.len() {
        match rest[part..].chars().next() {
            Some(',') => {
                parts.push(&rest[..part]);
                (rest, part) = (&rest[part + 1..], 0);
            }
            Some('<' | '{' | '(' | '[' | '"') => part += length_of_value(&rest[part..]).ok_or("a list that does not end")?,
            other => part += other.map_or(1, char::len_utf8),
        }
    }
    parts.push(rest);
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).map(parameter).collect()
}

fn parameter(text: &str) -> Result<Parameter, String> {
    let unfit = || format!("{text:?} is no tensor of known size, of booleans, integers or floats");
    let (before, ty) = text.split_once("tensor<").ok_or_else(unfit)?;
    let (ty, after) = ty.split_once('>').ok_or_else(unfit)?;
    let mut parts: Vec<&str> = ty.split('x').collect();
    let element = parts.pop().and_then(Element::by_name).ok_or_else(unfit)?;
    let dims: Option<Vec<usize>> = parts.into_iter().map(|dim| dim.parse().ok()).collect();
    let quoted = |marker: &str| after.split_once(marker)?.1.split_once('"').map(|(name, _)| name.to_owned());
    let own = before.trim().trim_end_matches(':').trim_start_matches('%');
    let numbered = own.trim_start_matches("arg").bytes().all(|b| b.is_ascii_digit());
    let own = Some(own.to_owned()).filter(|_| !numbered);
    let name = own.or_else(|| quoted("jax.result_info = \"")).or_else(|| quoted("loc(\""));
    Ok(Parameter { name, element, dims: dims.ok_or_else(unfit)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARDED: &str = r#"#loc1 = loc("hidden")
module @jit_loss attributes {mhlo.num_partitions = 2 : i32, mhlo.num_replicas = 1 : i32} {
  sdy.mesh @mesh = <["data"=2]> {stablehlo.mesh = {axes = [{name = "data", size = 2 : i64}]}} loc(#loc)
  func.func public @main(%arg0: tensor<8x16xbf16> {sdy.sharding = #sdy.sharding<@mesh, [{"data"}, {}]>}, %arg1: tensor<40x16xbf16> {mhlo.sharding = "{devices=[2,1]<=[2]}", tf.aliasing_output = 1 : i32}, %arg2: tensor<8xi32> {tf.a = 0 : i32, sdy.sharding = #sdy.sharding<@mesh, [{"data"}]>} loc("targets")) -> (tensor<f32> {jax.result_info = "result[0]"}, tensor<8x16xbf16> {jax.result_info = "result[1][0]"}, tensor<40x16xf32> {jax.result_info = "result[1][1]"}) {
    %0 = sdy.sharding_constraint %arg0 <@mesh, [{"data"}, {}]> : tensor<8x16xbf16> loc(#loc53)
"#;

    fn main(signature: &str) -> Result<Module, String> {
        Module::parse(&format!("module @m {{\n  func.func public @main{signature} {{\n  }}\n}}\n"))
    }

    fn outcomes(module: &Module) -> Vec<Option<Outcome>> {
        module.results.iter().map(|(_, outcome)| *outcome).collect()
    }

    #[test]
    fn shardings_are_taken_off() {
        let module = Module::parse(SHARDED).unwrap();
        let expected = r#"#loc1 = loc("hidden")
module @jit_loss attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
  func.func public @main(%arg0: tensor<8x16xbf16> {}, %arg1: tensor<40x16xbf16> {tf.aliasing_output = 1 : i32}, %arg2: tensor<8xi32> {tf.a = 0 : i32} loc("targets")) -> (tensor<f32> {jax.result_info = "result[0]"}, tensor<8x16xbf16> {jax.result_info = "result[1][0]"}, tensor<40x16xf32> {jax.result_info = "result[1][1]"}) {
    %0 = stablehlo.optimization_barrier %arg0  : tensor<8x16xbf16> loc(#loc53)
"#;
        assert_eq!(module.text, expected);
        assert_eq!(outcomes(&module), [None, Some(Outcome::DHidden), Some(Outcome::DUnembedding)]);
        let error = Module::parse(&format!("{SHARDED}    %1 = sdy.manual_computation(%0)\n")).unwrap_err();
        assert_eq!(error, "it is for several devices: \"%1 = sdy.manual_computation(%0)\" has sdy.");
    }

    #[test]
    fn names_go_before_positions() {
        let by_name = "(%x: tensor<5x3xf32> loc(\"unembedding\"), %hidden: tensor<2x3xf32>, %arg2: tensor<2xi64> loc(\"labels\"), \
            %arg3: tensor<2xf32> loc(\"cotangent\")) -> (tensor<5x3xf32> {jax.result_info = \"result['d_unembedding']\"}, \
            tensor<2xf32> {jax.result_info = \"[1]['lse']\"}, tensor<2x3xf32> {jax.result_info = \"['d_hidden']\"}, tensor<7xi1>)";
        // %x is a name, too, and none that is known.
        let error = main(by_name).unwrap_err();
        assert!(error.contains("tensor<2x3xf32> (hidden) stands where unembedding does"), "{error}");
        let module = main(&by_name.replace("%x", "%arg0")).unwrap();
        let arguments: Vec<Argument> = module.arguments.iter().map(|(_, argument)| *argument).collect();
        assert_eq!(arguments, [Argument::Unembedding, Argument::Hidden, Argument::Labels, Argument::Cotangent]);
        assert_eq!(outcomes(&module), [Some(Outcome::DUnembedding), Some(Outcome::Lse), Some(Outcome::DHidden), None]);
        // Where N = V the order decides.
        let square =
            main("(%arg0: tensor<3x3xf32>, %arg1: tensor<3x3xf32>, %arg2: tensor<3xi32>) -> (tensor<3x3xf32>, tensor<3x3xf32>)");
        assert_eq!(outcomes(&square.unwrap()), [Some(Outcome::DHidden), Some(Outcome::DUnembedding)]);
        let one = main("(%arg0: tensor<2x3xf32>, %arg1: tensor<5x3xf32>, %arg2: tensor<2xi32>) -> tensor<5x3xf32>").unwrap();
        assert_eq!(outcomes(&one), [Some(Outcome::DUnembedding)]);
    }

    #[test]
    fn other_signatures_are_refused() {
        let refused = |signature: &str, found: &str| {
            let error = main(signature).unwrap_err();
            assert!(error.contains(found), "{error}");
        };
        let (q, k, t) = ("%arg0: tensor<2x3xf32>", "%arg1: tensor<5x3xf32>", "%arg2: tensor<2xi32>");
        refused("() -> tensor<f32>", "@main takes nothing");
        refused(&format!("({q}, {k}) -> tensor<2x3xf32>"), "@main takes tensor<2x3xf32>, tensor<5x3xf32>");
        refused(&format!("({q}, {k}, %arg2: tensor<2xf32>) -> tensor<2x3xf32>"), "@main takes tensor<2xf32> as targets");
        refused(&format!("({q}, {k}, {t}) -> tensor<f32>"), "@main gives tensor<f32>, none of which is d_hidden");
        refused(&format!("({q}, {k}, {t})"), "@main gives nothing");
        refused(&format!("({q}, {k}, {t}, {t}, {t}) -> tensor<2x3xf32>"), "@main takes");
        refused(&format!("(%arg0: tensor<?x3xf32>, {k}, {t}) -> tensor<2x3xf32>"), "is no tensor of known size");
        refused(&format!("({q}, {k}, {t}) -> (tensor<2x3xf32> {{jax.result_info = \"d_unembedding\"}})"), "@main gives");
        for text in ["", "no module", "func.func @other(%arg0: tensor<f32>)", "func.func @main(%arg0: tensor<f32>"] {
            assert!(Module::parse(text).unwrap_err().contains("no public function @main"), "{text}");
        }
    }
}
