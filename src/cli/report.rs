//! Reports: one value, shown to people as aligned `key: value` lines or to programs as JSON, in the order of its fields.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde::Serialize;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::error::{CliError, Exit};

/// Prints `report` on standard output.
pub(crate) fn print(report: &impl Serialize, json: bool) -> Result<(), CliError> {
    let text = serde_json::to_string(report).map_err(|error| CliError::new(Exit::Other, error))?;
    print_json(&text, json)
}

/// The same for a report that is JSON already.
pub(crate) fn print_json(text: &str, json: bool) -> Result<(), CliError> {
    if json {
        return say(&format!("{text}\n"));
    }
    let tree: Node = serde_json::from_str(text).map_err(|error| CliError::new(Exit::Other, error))?;
    say(&render(&tree))
}

/// Writes to standard output; a reader that has seen enough is no failure.
pub(crate) fn say(text: &str) -> Result<(), CliError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(CliError::io("standard output", &error)),
        _ => Ok(()),
    }
}

/// Writes a line to standard error, where whoever does not hear it still gets the exit code.
pub(crate) fn tell(text: &str) {
    super::progress::clear();
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

/// `1 file`, `2 keys`, `1 directory`, `2 directories`.
pub(crate) fn counted(count: u64, what: &str) -> String {
    let stem = what.strip_suffix('y').filter(|stem| !stem.ends_with(['a', 'e', 'o', 'u']));
    match (count, stem) {
        (1, _) => format!("1 {what}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        (_, None) => format!("{count} {what}s"),
    }
}

/// `3 of 12 files`, `0 of 1 file`.
pub(crate) fn part(done: u64, all: u64, what: &str) -> String {
    format!("{done} of {}", counted(all, what))
}

/// What others named must not steer the terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

fn render(node: &Node) -> String {
    let mut text = String::new();
    put(&mut text, node, 0);
    text
}

/// A JSON value that remembers the order of its fields.
enum Node {
    Scalar(String),
    List(Vec<Node>),
    Fields(Vec<(String, Node)>),
}

impl Node {
    /// The value in one line, if it fits one.
    fn inline(&self) -> Option<String> {
        match self {
            Self::Scalar(text) => Some(text.clone()),
            Self::List(items) if items.is_empty() => Some("none".to_owned()),
            Self::List(items) => items
                .iter()
                .map(|item| if let Self::Scalar(text) = item { Some(text.as_str()) } else { None })
                .collect::<Option<Vec<_>>>()
                .map(|texts| texts.join(", ")),
            Self::Fields(_) => None,
        }
    }
}

fn put(text: &mut String, node: &Node, indent: usize) {
    let margin = " ".repeat(indent);
    match node {
        Node::Fields(fields) => {
            let width = fields.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) + 1;
            for (name, value) in fields {
                put_field(text, &name.replace('_', " "), value, indent, width);
            }
        }
        Node::List(items) => {
            for (number, item) in items.iter().enumerate() {
                if number > 0 {
                    text.push('\n');
                }
                put(text, item, indent);
            }
        }
        // Writing to a string does not fail.
        Node::Scalar(value) => _ = writeln!(text, "{margin}{value}"),
    }
}

fn put_field(text: &mut String, name: &str, value: &Node, indent: usize, width: usize) {
    let margin = " ".repeat(indent);
    // Writing to a string does not fail.
    if let Some(line) = value.inline() {
        let _ = writeln!(text, "{margin}{:width$} {line}", format!("{name}:"));
    } else {
        let _ = writeln!(text, "{margin}{name}:");
        put(text, value, indent + 4);
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(if value { "yes" } else { "no" }.to_owned()))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }
    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(printable(value)))
    }
    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar("none".to_owned()))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut fields = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            fields.push(entry);
        }
        Ok(Node::Fields(fields))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_anything_is_no_plural() {
        let said = [(0, "file"), (1, "file"), (2, "key"), (1, "entry"), (3, "entry")].map(|(n, what)| counted(n, what));
        assert_eq!(said, ["0 files", "1 file", "2 keys", "1 entry", "3 entries"]);
        assert_eq!([part(1, 12, "file"), part(0, 1, "file")], ["1 of 12 files", "0 of 1 file"]);
    }

    #[test]
    fn people_get_aligned_lines_in_order() {
        let json = r#"{"path":"/a\u001b[2J","plain_size":12,"ok":true,"log":null,"ids":["x","y"],"none":[],
            "slots":[{"slot":"A","state":"valid"},{"slot":"B","state":"empty"}]}"#;
        let expected = "\
path:       /a\u{fffd}[2J
plain size: 12
ok:         yes
log:        none
ids:        x, y
none:       none
slots:
    slot:  A
    state: valid

    slot:  B
    state: empty
";
        assert_eq!(render(&serde_json::from_str(json).unwrap()), expected);
    }
}
