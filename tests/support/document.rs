//! What a document tells people to type: the lines of its `sh` blocks, and commands within sentences.

use std::fs;
use std::path::Path;

/// Languages that a block of the document may be in.
const LANGUAGES: [&str; 8] = ["sh", "text", "ini", "fstab", "toml", "json", "yaml", "hcl"];

/// A block of code.
pub(crate) struct Block {
    pub(crate) language: String,
    pub(crate) lines: Vec<String>,
}

pub(crate) fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).unwrap()
}

/// All blocks, each of which says its language.
pub(crate) fn blocks(document: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let mut inside = false;
    for line in document.lines() {
        match line.strip_prefix("```") {
            Some("") if inside => inside = false,
            Some(language) => {
                assert!(
                    LANGUAGES.contains(&language),
                    "a block of code in {language:?}: say which of {LANGUAGES:?} it is"
                );
                found.push(Block { language: language.to_owned(), lines: Vec::new() });
                inside = true;
            }
            None if inside => found.last_mut().unwrap().lines.push(line.to_owned()),
            None => {}
        }
    }
    found
}

/// The commands of all `sh` blocks, without comments.
pub(crate) fn commands(document: &str) -> Vec<String> {
    let lines = blocks(document).into_iter().filter(|block| block.language == "sh").flat_map(|block| block.lines);
    lines.map(|line| line.split(" #").next().unwrap().trim().to_owned()).filter(|line| !line.is_empty()).collect()
}

/// What stands between backticks outside of blocks.
pub(crate) fn spans(document: &str) -> Vec<String> {
    let mut outside = String::new();
    let mut inside = false;
    for line in document.lines() {
        if line.starts_with("```") {
            inside = !inside;
        } else if !inside {
            outside.push_str(line);
            outside.push('\n');
        }
    }
    let mut found = Vec::new();
    for paragraph in outside.split("\n\n") {
        let parts: Vec<_> = paragraph.split('`').collect();
        assert!(parts.len() % 2 == 1, "a backtick has no other: {paragraph}");
        found.extend(parts.iter().skip(1).step_by(2).map(|span| span.replace('\n', " ")));
    }
    found
}
