//! What a line of the log looks like: text, JSON, or text for a journal that takes the priority from its beginning. What is
//! sent to a journal itself has no lines.

use std::fmt::{self, Write as _};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{self, FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::registry::LookupSpan;

/// How lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs: one object in each line, with `time`, `level`, `target`, `message`, and the event's fields.
    Json,
    /// For the journal of systemd: an entry with fields, sent to it directly.
    Journald,
}

impl Format {
    /// The names.
    pub const NAMES: [&'static str; 3] = ["text", "json", "journald"];
}

impl std::str::FromStr for Format {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "journald" => Ok(Self::Journald),
            _ => Err(()),
        }
    }
}

/// Writes events in a format.
pub(super) struct Lines {
    pub(super) format: Format,
    /// Each line begins with its priority, as `sd-daemon(3)` has it; the journal knows the time by itself.
    pub(super) for_journal: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if self.for_journal {
            write!(out, "<{}>", priority(*event.metadata().level()))?;
        }
        match (self.format, self.for_journal) {
            (Format::Json, _) => json(out, event),
            (_, true) => {
                // A line break would begin an entry of another priority.
                let mut text = String::new();
                format::format().without_time().with_level(false).with_ansi(false).format_event(
                    context,
                    Writer::new(&mut text),
                    event,
                )?;
                writeln!(out, "{}", one_line(&text))
            }
            (_, false) => {
                let mut text = String::new();
                let ansi = out.has_ansi_escapes();
                format::format().with_ansi(ansi).format_event(context, Writer::new(&mut text), event)?;
                writeln!(out, "{}", one_line(&text))
            }
        }
    }
}

/// An event is one line: a name in it must not begin another. Escape sequences of values are gone already; those that are
/// there are colours.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.trim_end().chars() {
        if c.is_control() && c != '\u{1b}' { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// What an event says, in one line, without its other fields.
pub(super) fn message(event: &Event<'_>) -> String {
    let mut fields = Fields(Map::new());
    event.record(&mut fields);
    one_line(fields.0.get("message").and_then(Value::as_str).unwrap_or_default())
}

/// That of syslog.
pub(super) fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn json(mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    let metadata = event.metadata();
    let mut fields = Fields(Map::new());
    fields.0.insert("time".to_owned(), time.into());
    fields.0.insert("level".to_owned(), metadata.level().as_str().to_ascii_lowercase().into());
    fields.0.insert("target".to_owned(), metadata.target().into());
    event.record(&mut fields);
    writeln!(out, "{}", Value::Object(fields.0))
}

struct Fields(Map<String, Value>);

impl Fields {
    /// A field does not take the place of what the line says of itself.
    fn put(&mut self, field: &Field, value: Value) {
        let name = field.name();
        let name = if self.0.contains_key(name) { format!("field_{name}") } else { name.to_owned() };
        self.0.insert(name, value);
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = write!(text, "{value:?}");
        self.put(field, text.into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};
    use tracing_subscriber::layer::SubscriberExt;

    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: Format, for_journal: bool) -> String {
        let kept = Kept::default();
        let writer = kept.clone();
        let layer = tracing_subscriber::fmt::layer()
            .event_format(Lines { format, for_journal })
            .with_writer(move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::warn!(request_id = "id-1", level = 7, "two\nlines of \"text\"");
            tracing::error!("second");
        });
        let bytes = kept.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn json_lines_hold_message_and_fields() {
        let text = logged(Format::Json, false);
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        let first = &lines[0];
        assert_eq!(
            (&first["level"], &first["field_level"], &first["request_id"]),
            (&"warn".into(), &7.into(), &"id-1".into())
        );
        assert_eq!(first["message"], "two\nlines of \"text\"");
        assert!(
            first["time"].as_str().unwrap().ends_with('Z') && first["target"].as_str().unwrap().starts_with("kmsfs")
        );
    }

    #[test]
    fn each_line_for_the_journal_has_its_priority() {
        for format in [Format::Text, Format::Json] {
            let text = logged(format, true);
            let lines: Vec<_> = text.lines().collect();
            assert!(lines.len() == 2 && lines[0].starts_with("<4>") && lines[1].starts_with("<3>"), "{text}");
            assert!(lines[0].contains("id-1"), "{text}");
        }
        let text = logged(Format::Text, false);
        assert!(!text.contains("<4>") && text.lines().count() == 2 && text.contains(r"two\nlines"), "{text}");
    }
}
