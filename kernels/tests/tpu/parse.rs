//! MLIR's generic text: operations, regions, attributes. Panics, saying where, on anything else.

use super::array::Type;
use std::collections::HashMap;

/// A value's place among all that its function makes.
pub type Slot = usize;

#[derive(Debug)]
pub struct Operation {
    /// Without the dialect's stability prefix.
    pub name: String,
    pub result: Option<Slot>,
    pub operands: Vec<Slot>,
    pub regions: Vec<Region>,
    /// By name, as they are written.
    pub attributes: HashMap<String, String>,
    pub result_types: Vec<Type>,
}

#[derive(Debug, Default)]
pub struct Region {
    pub arguments: Vec<(Slot, Type)>,
    pub operations: Vec<Operation>,
}

#[derive(Debug)]
pub struct Function {
    pub attributes: HashMap<String, String>,
    pub region: Region,
    pub slots: usize,
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    slots: HashMap<String, Slot>,
    types: Vec<Type>,
}

/// The functions of a module of the stable form.
pub fn module(text: &str) -> Vec<Function> {
    let mut parser = Parser { text, at: 0, slots: HashMap::new(), types: Vec::new() };
    parser.expect("\"builtin.module\"() ({");
    let mut functions = Vec::new();
    while !parser.accept("})") {
        parser.slots.clear();
        parser.types.clear();
        let mut function = parser.operation();
        assert_eq!(function.name, "func.func");
        let region = function.regions.remove(0);
        functions.push(Function { attributes: function.attributes, region, slots: parser.types.len() });
    }
    let attributes = parser.attributes();
    assert_eq!(attributes["stable_mosaic.version"], "3 : i64");
    parser.expect(": () -> ()");
    parser.space();
    assert_eq!(parser.at, text.len(), "nothing after the module");
    functions
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    fn accept(&mut self, token: &str) -> bool {
        self.space();
        let found = self.rest().starts_with(token);
        self.at += if found { token.len() } else { 0 };
        found
    }

    fn expect(&mut self, token: &str) {
        assert!(self.accept(token), "expected {token} at: {:.120}", self.rest());
    }

    /// Up to one of `ends` outside of all brackets.
    fn until(&mut self, ends: &[char]) -> &'a str {
        self.space();
        let rest = self.rest();
        let mut depth = 0;
        let mut last = ' ';
        let end = rest.find(|c: char| {
            let ends_here = depth == 0 && ends.contains(&c);
            let arrow = last == '-' && c == '>';
            last = c;
            match c {
                _ if ends_here => {}
                '(' | '[' | '{' | '<' => depth += 1,
                ')' | ']' | '}' => depth -= 1,
                '>' if !arrow => depth -= 1,
                _ => {}
            }
            ends_here
        });
        let end = end.unwrap_or_else(|| panic!("no {ends:?} after: {rest:.120}"));
        self.at += end;
        rest[..end].trim()
    }

    fn list<T>(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let mut items = Vec::new();
        if self.accept(close) {
            return items;
        }
        loop {
            items.push(item(self));
            if self.accept(close) {
                return items;
            }
            self.expect(",");
        }
    }

    fn types(&mut self) -> Vec<Type> {
        self.expect("(");
        self.list(")", |p| Type::parse(p.until(&[',', ')'])))
    }

    fn attributes(&mut self) -> HashMap<String, String> {
        if !self.accept("{") {
            return HashMap::new();
        }
        let pairs = self.list("}", |p| {
            let name = p.until(&['=']).to_owned();
            p.expect("=");
            (name, p.until(&[',', '}']).to_owned())
        });
        pairs.into_iter().collect()
    }

    fn define(&mut self, name: &str, ty: Type) -> Slot {
        let slot = self.types.len();
        self.types.push(ty);
        assert!(self.slots.insert(name.to_owned(), slot).is_none(), "{name} is defined twice");
        slot
    }

    fn operation(&mut self) -> Operation {
        self.space();
        let result = self.rest().starts_with('%').then(|| {
            let name = self.until(&['=']);
            self.expect("=");
            name
        });
        self.expect("\"stable_mosaic.");
        let name = self.until(&['"']).to_owned();
        self.expect("\"");
        self.expect("(");
        let operands = self.list(")", |p| {
            let name = p.until(&[',', ')']);
            *p.slots.get(name).unwrap_or_else(|| panic!("{name} is used and not defined"))
        });
        let mut regions = Vec::new();
        if self.accept("(") {
            regions = self.list(")", Self::region);
        }
        let attributes = self.attributes();
        self.expect(":");
        let operand_types = self.types();
        self.expect("->");
        let result_types = if self.accept("()") { Vec::new() } else { vec![Type::parse(self.until(&['\n']))] };
        for (slot, ty) in operands.iter().zip(&operand_types) {
            assert_eq!(&self.types[*slot], ty, "{name} takes another type than was made");
        }
        assert_eq!(operands.len(), operand_types.len(), "{name}");
        assert_eq!(result.is_some(), !result_types.is_empty(), "{name}");
        let result = result.map(|name| self.define(name, result_types[0].clone()));
        Operation { name, result, operands, regions, attributes, result_types }
    }

    fn region(&mut self) -> Region {
        self.expect("{");
        let mut region = Region::default();
        if self.accept("^bb0(") {
            region.arguments = self.list(")", |p| {
                let name = p.until(&[':']);
                p.expect(":");
                let ty = Type::parse(p.until(&[',', ')']));
                (p.define(name, ty.clone()), ty)
            });
            self.expect(":");
        }
        while !self.accept("}") {
            region.operations.push(self.operation());
        }
        region
    }
}

/// The integers of `array<i64: 1, 2>`, `[1, 2]` or `dense<1>`.
pub fn integers(attribute: &str) -> Vec<i64> {
    let inner = attribute.split_once(':').filter(|_| attribute.starts_with("array")).map_or(attribute, |(_, inner)| inner);
    let numbers = inner.split(|c: char| !(c.is_ascii_digit() || c == '-')).filter(|number| !number.is_empty());
    numbers.map(|number| number.parse().unwrap_or_else(|_| panic!("integers in {attribute}"))).collect()
}
