//! A kernel as an operation of a StableHLO program: `custom_call @tpu_custom_call`, with the body in its configuration.

use crate::stablehlo::{Body, Type, Value};

/// A kernel, and what XLA is told of it.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub name: &'static str,
    /// Mosaic.
    pub body: String,
    pub results: Vec<Type>,
    /// The operand whose memory the result takes over.
    pub adds_to: Option<Aliased>,
    /// For XLA's cost analysis: operations of the products, and exponentials.
    pub flops: u64,
    pub exps: u64,
}

/// An operand and a result that share their memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Aliased {
    pub operand: usize,
    pub result: usize,
}

impl Call {
    /// Calls the kernel, which may use `vmem` bytes of VMEM: all that there is, since of less the compiler would silently make one
    /// buffer of two, and fetch nothing ahead.
    pub fn emit(&self, program: &mut Body, operands: &[Value], vmem: usize) -> Vec<Value> {
        let bytes: u64 = operands.iter().map(|v| &v.ty).chain(&self.results).map(bytes).sum();
        let config = format!(
            "{{\"custom_call_config\": {{\"body\": \"{}\", \"serialization_format\": 1, \"needs_layout_passes\": true, \
             \"cost_estimate\": {{\"flops\": {}, \"transcendentals\": {}, \"bytes_accessed\": {bytes}}}}}, \
             \"scoped_memory_configs\": [{{\"memory_space\": 1, \"offset\": 0, \"size\": {vmem}}}]}}",
            base64(self.body.as_bytes()),
            self.flops,
            self.exps,
        );
        let layouts = |types: &mut dyn Iterator<Item = &Type>| types.map(row_major).collect::<Vec<_>>().join(", ");
        let aliases = self.adds_to.map_or(String::new(), |Aliased { operand, result }| {
            let tuple = if self.results.len() == 1 { String::new() } else { result.to_string() };
            format!(
                ", output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [{tuple}], \
                 operand_index = {operand}, operand_tuple_indices = []>]"
            )
        });
        let attributes = format!(
            "backend_config = \"{}\", kernel_name = \"{}\", operand_layouts = [{}], result_layouts = [{}]{aliases}",
            config.replace('"', "\\22"),
            self.name,
            layouts(&mut operands.iter().map(|v| &v.ty)),
            layouts(&mut self.results.iter()),
        );
        program.custom_call("tpu_custom_call", operands, &attributes, &self.results)
    }
}

fn row_major(ty: &Type) -> String {
    let order: Vec<String> = (0..ty.dims.len()).rev().map(|dim| dim.to_string()).collect();
    format!("dense<[{}]> : tensor<{}xindex>", order.join(", "), order.len())
}

fn bytes(ty: &Type) -> u64 {
    ty.dims.iter().product::<usize>() as u64 * if ty.element == "bf16" { 2 } else { 4 }
}

/// RFC 4648, with padding.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().enumerate().fold(0u32, |word, (i, &byte)| word | u32::from(byte) << (16 - 8 * i));
        let digit = |i: usize| char::from(DIGITS[(word >> (18 - 6 * i)) as usize & 63]);
        (0..4).for_each(|i| text.push(if i <= three.len() { digit(i) } else { '=' }));
    }
    text
}

#[cfg(test)]
mod tests {
    /// The test vectors of RFC 4648.
    #[test]
    fn base64_of() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(super::base64(bytes.as_bytes()), text);
        }
    }
}
