//! `--filter KEY=VALUE`: values of one key are alternatives, keys add up.

use anyhow::{Context, bail};
use std::collections::BTreeMap;

/// What is wanted, by key.
#[derive(Debug, Default)]
pub(super) struct Filters {
    wanted: BTreeMap<String, Vec<String>>,
}

impl Filters {
    /// Reads the option's values; `known` are the keys that make sense.
    pub(super) fn parse(options: &[String], known: &[&str]) -> anyhow::Result<Self> {
        let mut wanted = BTreeMap::<String, Vec<String>>::new();
        for option in options {
            let (key, value) = option
                .split_once('=')
                .with_context(|| format!("--filter {option:?}: it is KEY=VALUE"))?;
            if !known.contains(&key) {
                bail!("--filter {option:?}: the keys are {}", known.join(", "));
            }
            wanted
                .entry(key.to_owned())
                .or_default()
                .push(value.to_owned());
        }
        Ok(Self { wanted })
    }

    /// Whether something fits what is wanted of `key`.
    pub(super) fn fits(&self, key: &str, fits: impl Fn(&str) -> bool) -> bool {
        let wanted = self.wanted.get(key);
        wanted.is_none_or(|values| values.iter().any(|value| fits(value)))
    }

    /// The same for labels: `NAME` or `NAME=VALUE`, all of which are wanted.
    pub(super) fn fits_labels<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        let wanted = self.wanted.get("label").into_iter().flatten();
        let mut wanted = wanted.map(|text| match text.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (text.as_str(), None),
        });
        wanted.all(|(name, value)| {
            let has = label(name);
            has.is_some() && value.is_none_or(|value| has == Some(value))
        })
    }

    /// The values of a key.
    pub(super) fn of(&self, key: &str) -> &[String] {
        self.wanted.get(key).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(options: &[&str]) -> anyhow::Result<Filters> {
        let options: Vec<String> = options.iter().map(|&o| o.to_owned()).collect();
        Filters::parse(&options, &["name", "status", "label"])
    }

    #[test]
    fn fits_takes_one_value_of_each_key() {
        let filters = filters(&["name=a", "name=b", "status=up"]).unwrap();
        let fits = |name: &str, status: &str| {
            filters.fits("name", |v| v == name) && filters.fits("status", |v| v == status)
        };
        assert!(fits("a", "up") && fits("b", "up"));
        assert!(!fits("c", "up") && !fits("a", "down"));
        assert!(filters.fits("else", |_| false));
    }

    #[test]
    fn fits_labels_wants_all_of_them() {
        let has = |name: &str| match name {
            "a" => Some("1"),
            "b" => Some(""),
            _ => None,
        };
        for (options, fits) in [
            (&["label=a", "label=b"][..], true),
            (&["label=a=1"], true),
            (&["label=a=2"], false),
            (&["label=a", "label=c"], false),
            (&[], true),
        ] {
            assert_eq!(
                filters(options).unwrap().fits_labels(has),
                fits,
                "{options:?}"
            );
        }
    }

    #[test]
    fn parse_of_unknown_keys_names_the_known_ones() {
        for option in ["colour=red", "name"] {
            let error = filters(&[option]).unwrap_err().to_string();
            assert!(error.contains(option), "{error}");
        }
    }
}
