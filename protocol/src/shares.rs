//! CPU shares, which cgroup v2 has not.

/// Shares of 2 to 262144 (1024 usual) on weights of 1 to 10000 (100 usual), with runc's curve:
/// a quadratic through the three pairs in logarithmic space, so that the usual meets the usual.
pub fn weight_of_shares(shares: u64) -> u64 {
    match shares {
        0..=2 => 1,
        262_144.. => 10_000,
        _ => {
            let l = (shares as f64).log2();
            let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
            (10_f64.powf(exponent).ceil() as u64).clamp(1, 10_000)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weight_of_the_usual_and_of_both_ends() {
        assert_eq!(weight_of_shares(1024), 100);
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(262_144), 10_000);
    }
}
