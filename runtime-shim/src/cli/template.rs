//! `--format`: the part of Go's template language that people use with Docker.
//!
//! Text, `{{.Field.Sub}}`, and the functions `json`, `upper`, `lower`, `len`,
//! `index` and `join` on a field. The one crate for the whole language was last
//! released years ago.

use anyhow::{Context, bail};
use casemate_protocol::text::printable;
use serde_json::Value;

/// A compiled template.
#[derive(Debug, PartialEq)]
pub(super) struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq)]
enum Part {
    Text(String),
    Action(Vec<Token>),
}

#[derive(Debug, PartialEq, Clone)]
enum Token {
    /// `.A.B`; empty for `.`.
    Field(Vec<String>),
    /// A function's name.
    Word(String),
    /// `"text"`.
    Text(String),
    /// `0`, `1` …
    Number(usize),
}

impl Template {
    /// Compiles a template; `\t` and `\n` stand for themselves as with Docker.
    pub(super) fn parse(source: &str) -> anyhow::Result<Self> {
        let mut parts = Vec::new();
        let mut rest = source;
        while let Some(start) = rest.find("{{") {
            parts.push(Part::Text(unescape(&rest[..start])));
            let end = rest[start..]
                .find("}}")
                .with_context(|| format!("--format: \"{{{{\" without \"}}}}\" in {source:?}"))?
                + start;
            let tokens = tokens(rest[start + 2..end].trim_matches(['-', ' ', '\t']))
                .with_context(|| format!("--format: {:?}", &rest[start..end + 2]))?;
            parts.push(Part::Action(tokens));
            rest = &rest[end + 2..];
        }
        parts.push(Part::Text(unescape(rest)));
        parts.retain(|p| *p != Part::Text(String::new()));
        Ok(Self { parts })
    }

    /// Fills the template from a value.
    pub(super) fn render(&self, value: &Value) -> anyhow::Result<String> {
        let mut out = String::new();
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_str(text),
                Part::Action(tokens) => out.push_str(&evaluate(tokens, value)?),
            }
        }
        Ok(out)
    }

    /// What stands in a table's header for this template: the fields' names in capitals; of `kind` is the "ID".
    pub(super) fn header(&self, kind: &str) -> String {
        let name = |tokens: &[Token]| {
            tokens.iter().find_map(|t| match t {
                Token::Field(path) => path.last().map(|f| heading(f, kind)),
                _ => None,
            })
        };
        self.parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text.clone(),
                Part::Action(tokens) => name(tokens).unwrap_or_default(),
            })
            .collect()
    }
}

/// `CreatedSince` → `CREATED SINCE`; the few that Docker names otherwise.
fn heading(field: &str, kind: &str) -> String {
    match field {
        "ID" => return format!("{kind} ID").trim_start().into(),
        "CreatedSince" => return "CREATED".into(),
        _ => {}
    }
    let mut out = String::new();
    for (i, c) in field.chars().enumerate() {
        if i > 0 && c.is_ascii_uppercase() {
            out.push(' ');
        }
        out.push(c.to_ascii_uppercase());
    }
    out
}

fn unescape(text: &str) -> String {
    text.replace("\\t", "\t").replace("\\n", "\n")
}

fn tokens(action: &str) -> anyhow::Result<Vec<Token>> {
    let mut out = Vec::new();
    let mut rest = action.trim_start();
    while !rest.is_empty() {
        let (token, length) = if let Some(quoted) = rest.strip_prefix('"') {
            let end = quoted.find('"').context("a quote is not closed")?;
            (Token::Text(unescape(&quoted[..end])), end + 2)
        } else {
            let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
            (word(&rest[..end])?, end)
        };
        out.push(token);
        rest = rest[length..].trim_start();
    }
    if out.is_empty() {
        bail!("it is empty");
    }
    Ok(out)
}

fn word(text: &str) -> anyhow::Result<Token> {
    if let Some(path) = text.strip_prefix('.') {
        let fields: Vec<String> = path
            .split('.')
            .filter(|f| !f.is_empty())
            .map(str::to_owned)
            .collect();
        return Ok(Token::Field(fields));
    }
    if let Ok(number) = text.parse() {
        return Ok(Token::Number(number));
    }
    match text {
        "json" | "upper" | "lower" | "len" | "index" | "join" => Ok(Token::Word(text.to_owned())),
        other => bail!(
            "{other:?} is not supported; there are .Field, json, upper, lower, len, index and join"
        ),
    }
}

/// An action's text. Values come from images and guests: they are shown on one line, so that none can forge a row or a cell.
fn evaluate(tokens: &[Token], value: &Value) -> anyhow::Result<String> {
    let (function, arguments) = match tokens {
        [Token::Field(path)] => return Ok(show(field(path, value)?)),
        [Token::Word(name), arguments @ ..] => (name.as_str(), arguments),
        _ => bail!("--format: an action starts with a field or a function"),
    };
    let Some(Token::Field(path)) = arguments.first() else {
        bail!("--format: {function} wants a field");
    };
    let subject = field(path, value)?;
    Ok(match (function, &arguments[1..]) {
        ("json", []) => printable(&subject.to_string()).into_owned(),
        ("upper", []) => printable(&plain(subject).to_uppercase()).into_owned(),
        ("lower", []) => printable(&plain(subject).to_lowercase()).into_owned(),
        ("len", []) => match subject {
            Value::Array(items) => items.len(),
            Value::Object(fields) => fields.len(),
            Value::Null => 0,
            other => plain(other).len(),
        }
        .to_string(),
        ("index", [Token::Text(key)]) => show(subject.get(key).unwrap_or(&Value::Null)),
        ("index", [Token::Number(n)]) => show(subject.get(*n).unwrap_or(&Value::Null)),
        ("join", [Token::Text(separator)]) => {
            let items = subject.as_array().cloned().unwrap_or_default();
            let texts: Vec<String> = items.iter().map(show).collect();
            texts.join(separator)
        }
        _ => bail!("--format: wrong arguments for {function}"),
    })
}

fn field<'a>(path: &[String], value: &'a Value) -> anyhow::Result<&'a Value> {
    let mut at = value;
    for name in path {
        at = match at {
            Value::Object(fields) => fields
                .get(name)
                .with_context(|| format!("--format: there is no field {name:?} here"))?,
            Value::Null => return Ok(&Value::Null),
            _ => bail!("--format: {name:?} is asked of something without fields"),
        };
    }
    Ok(at)
}

fn show(value: &Value) -> String {
    printable(&plain(value)).into_owned()
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "<no value>".to_owned(),
        Value::Array(items) => {
            let texts: Vec<String> = items.iter().map(plain).collect();
            format!("[{}]", texts.join(" "))
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rendered(template: &str) -> anyhow::Result<String> {
        let value = json!({
            "ID": "abc", "Size": 7, "Names": ["a", "b"],
            "Config": {"Env": ["X=1"], "Labels": {"k": "v"}}, "Nothing": null,
            "Bad": "\x1b]0;x\x07\t\n\u{9b}", "Bads": ["\x1b", "b"],
        });
        Template::parse(template)?.render(&value)
    }

    #[test]
    fn render_of_supported_actions_matches_docker() {
        for (template, text) in [
            ("{{.ID}}", "abc"),
            ("{{ .ID }}\\t{{.Size}}", "abc\t7"),
            ("{{json .Names}}", r#"["a","b"]"#),
            ("{{.Names}}", "[a b]"),
            ("{{join .Names \", \"}}", "a, b"),
            ("{{index .Names 1}}", "b"),
            ("{{index .Config.Labels \"k\"}}", "v"),
            ("{{len .Names}}", "2"),
            ("{{upper .ID}} x", "ABC x"),
            ("{{.Nothing.More}}", "<no value>"),
            ("plain", "plain"),
            ("{{.Bad}}", r"\u001b]0;x\u0007\u0009\u000a\u009b"),
            ("{{json .Bad}}", r#""\u001b]0;x\u0007\t\n\u009b""#),
            ("{{upper .Bad}}", r"\u001b]0;X\u0007\u0009\u000a\u009b"),
            ("{{.Bads}}", r"[\u001b b]"),
            ("{{join .Bads \"\\n\"}}", "\\u001b\nb"),
            ("{{index .Bads 0}}", r"\u001b"),
        ] {
            assert_eq!(rendered(template).unwrap(), text, "{template}");
        }
    }

    #[test]
    fn parse_and_render_of_errors_name_them() {
        for (template, part) in [
            ("{{.ID", "{{"),
            ("{{.Nope}}", "Nope"),
            ("{{printf .ID}}", "printf"),
            ("{{}}", "empty"),
            ("{{json}}", "json"),
            ("{{.ID.Sub}}", "Sub"),
            ("{{index .Names}}", "index"),
        ] {
            let error = format!("{:#}", rendered(template).unwrap_err());
            assert!(error.contains(part), "{template}: {error}");
        }
    }

    #[test]
    fn header_names_the_fields() {
        let template = Template::parse("{{.ID}}\\t{{.CreatedSince}}\\t{{.ImageName}}").unwrap();
        assert_eq!(template.header("IMAGE"), "IMAGE ID\tCREATED\tIMAGE NAME");
    }

    proptest::proptest! {
        #[test]
        fn parse_of_anything_never_panics(text in "[{}. a-z\"\\\\0-9-]{0,30}") {
            let _ = rendered(&text);
        }
    }
}
