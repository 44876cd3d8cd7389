//! How the demonstration tells: scenes for people, with bytes in colour, or a line of JSON for each scene.

use std::fmt::{Display, Write as _};
use std::io::{self, BufRead, IsTerminal, Write as _};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::error::CliError;
use crate::cli::report;
use crate::format::anatomy::Field;
use crate::format::hex;

/// Bytes in a row of a dump.
const ROW: usize = 16;
const TITLE: &str = "1";
const LABEL: &str = "2";
/// Colours for fields that lie beside each other, to be seen on dark and on light.
const COLOURS: [&str; 6] = ["36", "33", "35", "32", "34", "31"];

/// One scene: what is said, and what a machine is told.
pub(super) struct Scene {
    id: &'static str,
    title: &'static str,
    lines: Vec<Line>,
    facts: Map<String, Value>,
}

enum Line {
    Text(String),
    Fact(&'static str, String),
    Bytes(Vec<u8>, Vec<Field>),
}

impl Scene {
    pub(super) fn new(id: &'static str, title: &'static str) -> Self {
        Self { id, title, lines: Vec::new(), facts: Map::new() }
    }

    /// A sentence.
    pub(super) fn say(mut self, text: impl Into<String>) -> Self {
        self.lines.push(Line::Text(text.into()));
        self
    }

    /// A fact: `label` for people, `key` for machines.
    pub(super) fn fact(self, key: &str, label: &'static str, value: impl Display + Serialize) -> Self {
        let shown = report::printable(&value.to_string());
        self.shown(key, label, value, shown)
    }

    /// A fact that people are shown in another way.
    pub(super) fn shown(mut self, key: &str, label: &'static str, value: impl Serialize, shown: String) -> Self {
        self.facts.insert(key.to_owned(), serde_json::to_value(value).unwrap_or_default());
        self.lines.push(Line::Fact(label, shown));
        self
    }

    /// Bytes with the names of their fields.
    pub(super) fn bytes(mut self, key: &str, bytes: &[u8], fields: &[Field]) -> Self {
        let named = fields.iter().map(|field| {
            let value = hex::encode(bytes.get(field.range.clone()).unwrap_or_default());
            serde_json::json!({"name": field.name, "offset": field.range.start, "bytes": value})
        });
        self.facts.insert(key.to_owned(), named.collect());
        self.lines.push(Line::Bytes(bytes.to_owned(), fields.to_owned()));
        self
    }
}

/// Tells scenes one after the other.
pub(super) struct Teller {
    pub(super) json: bool,
    pub(super) colour: bool,
    pub(super) pause: bool,
    number: u32,
}

impl Teller {
    pub(super) fn new(json: bool, no_colour: bool, pause: bool) -> Self {
        let unwanted = no_colour || json || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let colour = !unwanted && io::stdout().is_terminal();
        Self { json, colour, pause, number: 0 }
    }

    /// Tells a scene, and waits for the reader if he wants that.
    pub(super) fn tell(&mut self, scene: Scene) -> Result<(), CliError> {
        self.number += 1;
        if self.json {
            let mut line = Map::from_iter([("scene".to_owned(), Value::from(scene.id))]);
            line.extend(scene.facts);
            return report::say(&format!("{}\n", Value::Object(line)));
        }
        let title = format!("{}. {}", self.number, scene.title);
        let mut text = format!("\n{}\n", self.paint(TITLE, &title));
        for line in &scene.lines {
            match line {
                Line::Text(sentence) => put(&mut text, format_args!("{sentence}\n")),
                Line::Fact(label, value) => {
                    put(&mut text, format_args!("  {} {value}\n", self.paint(LABEL, &format!("{label:<18}"))));
                }
                Line::Bytes(bytes, fields) => text.push_str(&self.dump(bytes, fields)),
            }
        }
        report::say(&text)?;
        if self.pause { wait_for_enter() } else { Ok(()) }
    }

    fn paint(&self, style: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{style}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Rows of bytes, those of a field in one colour, with the names of the fields that begin in a row after it.
    fn dump(&self, bytes: &[u8], fields: &[Field]) -> String {
        let mut text = String::new();
        for (number, row) in bytes.chunks(ROW).enumerate() {
            let start = number * ROW;
            put(&mut text, format_args!("  {} ", self.paint(LABEL, &format!("{start:04x}"))));
            for (at, byte) in row.iter().enumerate() {
                let colour = fields.iter().position(|field| field.range.contains(&(start + at)));
                let shown = format!("{byte:02x}");
                let shown = colour.map_or(shown.clone(), |index| self.paint(COLOURS[index % COLOURS.len()], &shown));
                put(&mut text, format_args!(" {shown}"));
            }
            text.push_str(&"   ".repeat(ROW - row.len()));
            let begins = fields.iter().enumerate().filter(|(_, field)| {
                !field.range.is_empty() && (start..start + row.len()).contains(&field.range.start)
            });
            let names: Vec<String> =
                begins.map(|(index, field)| self.paint(COLOURS[index % COLOURS.len()], field.name)).collect();
            put(&mut text, format_args!("  {}\n", names.join(", ")));
        }
        text.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

/// Writing to a string does not fail.
fn put(text: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = text.write_fmt(what);
}

fn wait_for_enter() -> Result<(), CliError> {
    let failed = |error: io::Error| CliError::io("the terminal", &error);
    let mut stderr = io::stderr();
    stderr.write_all(b"[Enter]").and_then(|()| stderr.flush()).map_err(failed)?;
    io::stdin().lock().read_line(&mut String::new()).map(drop).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn teller(colour: bool) -> Teller {
        Teller { json: false, colour, pause: false, number: 0 }
    }

    #[test]
    fn a_dump_names_each_field_where_it_begins() {
        let field = |name, range| Field { name, meaning: "", range };
        let fields = [field("magic", 0..5), field("rest", 5..20), field("none", 20..20)];
        let plain = teller(false).dump(&[0xab; 20], &fields);
        let lines: Vec<_> = plain.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].starts_with("  0000  ab ab") && lines[0].ends_with("  magic, rest"), "{plain}");
        assert_eq!(lines[1], "  0010  ab ab ab ab");
        let colourful = teller(true).dump(&[0xab; 20], &fields);
        assert!(colourful.contains("\x1b[36mab\x1b[0m") && colourful.contains("\x1b[33mrest\x1b[0m"), "{colourful}");
    }
}
