//! A figure: its samples of both sides, and what is made of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One measured figure, as a measuring process prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Figure {
    /// Key of the summary.
    pub key: String,
    /// Unit of the samples, `ratio` where two sides are compared.
    pub unit: String,
    /// Our side, in the order measured.
    pub ours: Vec<f64>,
    /// The other side, sample by sample in turn with ours; empty where there is none.
    #[serde(default)]
    pub theirs: Vec<f64>,
    /// Unit of both sides where `unit` is `ratio`.
    #[serde(default)]
    pub side_unit: String,
    /// Further numbers worth keeping, e.g. VM exits by reason or phases of a start.
    #[serde(default)]
    pub details: BTreeMap<String, f64>,
}

impl Figure {
    /// A figure of one side.
    pub(crate) fn plain(key: &str, unit: &str, ours: Vec<f64>) -> Self {
        let (key, unit) = (key.to_owned(), unit.to_owned());
        Self {
            key,
            unit,
            ours,
            theirs: Vec::new(),
            side_unit: String::new(),
            details: BTreeMap::new(),
        }
    }

    /// A comparison, both sides measured in turn.
    pub(crate) fn ratio(key: &str, side_unit: &str, pairs: Vec<(f64, f64)>) -> Self {
        let (ours, theirs) = pairs.into_iter().unzip();
        Self {
            theirs,
            side_unit: side_unit.to_owned(),
            ..Self::plain(key, "ratio", ours)
        }
    }

    /// What the summary calls samples: the ratio of each pair, or our side as it is.
    pub(crate) fn samples(&self) -> Vec<f64> {
        if self.theirs.is_empty() {
            return self.ours.clone();
        }
        self.ours
            .iter()
            .zip(&self.theirs)
            .map(|(ours, theirs)| ours / theirs)
            .collect()
    }

    /// Median of the samples.
    pub(crate) fn median(&self) -> f64 {
        median(&self.samples())
    }
}

/// The middle of the values, or the mean of the two in the middle; NaN of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

/// The mean of the values; NaN of none.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn mean_of_some_and_none() {
        assert_eq!(mean(&[1.0, 2.0, 6.0]), 3.0);
        assert!(mean(&[]).is_nan());
    }

    #[test]
    fn samples_of_a_comparison_are_ratios_pair_by_pair() {
        let figure = Figure::ratio("k", "ms", vec![(10.0, 20.0), (30.0, 20.0)]);
        assert_eq!(figure.samples(), [0.5, 1.5]);
        assert_eq!(figure.median(), 1.0);
    }
}
