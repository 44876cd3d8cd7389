//! Spans of time, as people write them: `90` and `90s` are seconds, `30m` minutes, `1h` hours, `2d` days.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// What a span may end with, and its seconds.
const UNITS: [(char, f64); 4] = [('s', 1.0), ('m', 60.0), ('h', 3600.0), ('d', 86_400.0)];
/// The longest span: 100 years.
const MAX_SECONDS: f64 = 3_155_760_000.0;

/// A span of time from a flag, a variable or a settings file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Span(pub(crate) Duration);

impl Span {
    /// One of at least a second.
    pub(crate) fn at_least_a_second(text: &str) -> Result<Self, String> {
        let span = text.parse::<Self>()?;
        if span.0 < Duration::from_secs(1) { Err("it must be at least 1s".to_owned()) } else { Ok(span) }
    }

    fn of_seconds(seconds: f64) -> Option<Self> {
        Some(seconds).filter(|seconds| (0.0..=MAX_SECONDS).contains(seconds)).map(Duration::from_secs_f64).map(Self)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unit = text.chars().next_back().and_then(|last| UNITS.iter().find(|(unit, _)| *unit == last));
        let (number, factor) = unit.map_or((text, 1.0), |(_, factor)| (&text[..text.len() - 1], *factor));
        let is_plain = number.chars().all(|c| c.is_ascii_digit() || c == '.');
        let seconds = Some(number).filter(|_| is_plain).and_then(|number| number.parse::<f64>().ok());
        seconds.and_then(|seconds| Self::of_seconds(seconds * factor)).ok_or_else(|| {
            format!("{text:?} is no span of time: give seconds, or a number and its unit, as in 90s, 30m, 1h or 2d")
        })
    }
}

/// A number of seconds, or a text.
impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SpanVisitor)
    }
}

struct SpanVisitor;

impl Visitor<'_> for SpanVisitor {
    type Value = Span;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of seconds, or a text such as \"90s\" or \"30m\"")
    }

    fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Span, E> {
        Span::of_seconds(seconds).ok_or_else(|| E::invalid_value(de::Unexpected::Float(seconds), &self))
    }

    fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Span, E> {
        let span = u32::try_from(seconds).ok().and_then(|seconds| Span::of_seconds(seconds.into()));
        span.ok_or_else(|| E::invalid_value(de::Unexpected::Signed(seconds), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_units() {
        for (text, seconds) in [
            ("90", 90.0),
            ("90s", 90.0),
            ("1.5", 1.5),
            ("0.25s", 0.25),
            ("30m", 1800.0),
            ("1h", 3600.0),
            ("2d", 172_800.0),
        ] {
            assert_eq!(text.parse::<Span>().unwrap().0, Duration::from_secs_f64(seconds), "{text}");
        }
        for bad in ["", "s", "1x", "-1", "1e3", "1 h", "nan", "inf", "h1", "1h30", "é", "99999d", "1..2"] {
            let refused = bad.parse::<Span>().unwrap_err();
            assert!(refused.contains(&format!("{bad:?}")) && refused.contains("30m"), "{refused}");
        }
        assert!(Span::at_least_a_second("0.5").is_err() && Span::at_least_a_second("1").is_ok());
    }

    #[test]
    fn settings_files_hold_numbers_and_texts() {
        #[derive(serde::Deserialize)]
        struct File {
            t: Span,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.t.0.as_secs_f64());
        assert_eq!(read("t = 10").unwrap(), 10.0);
        assert_eq!(read("t = 0.5").unwrap(), 0.5);
        assert_eq!(read("t = '2m'").unwrap(), 120.0);
        for bad in ["t = -1", "t = nan", "t = 'fast'", "t = true", "t = 1e300"] {
            let refused = read(bad).unwrap_err().to_string();
            assert!(refused.contains("30m"), "{refused}");
        }
    }
}
