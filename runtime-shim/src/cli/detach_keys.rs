//! The keys that leave a container to itself, `ctrl-p,ctrl-q` unless asked for otherwise.

use anyhow::bail;
use std::str::FromStr;

/// More keys than anyone remembers.
const MAX_KEYS: usize = 16;

/// A sequence of keys, as the bytes that a terminal sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DetachKeys(Vec<u8>);

impl Default for DetachKeys {
    fn default() -> Self {
        Self(vec![0x10, 0x11])
    }
}

impl FromStr for DetachKeys {
    type Err = anyhow::Error;

    /// Single characters or `ctrl-` with a letter or one of `@[\]^_`, with commas between.
    fn from_str(text: &str) -> anyhow::Result<Self> {
        let key = |name: &str| match name.as_bytes() {
            [byte] if byte.is_ascii() => Some(*byte),
            [b'c', b't', b'r', b'l', b'-', byte] => match byte.to_ascii_uppercase() {
                upper @ b'@'..=b'_' => Some(upper - b'@'),
                _ => None,
            },
            _ => None,
        };
        let mut keys = Vec::new();
        for name in text.split(',') {
            match key(name) {
                Some(byte) if keys.len() < MAX_KEYS => keys.push(byte),
                Some(_) => bail!("{text:?} has more than {MAX_KEYS} keys"),
                None => bail!(
                    "{name:?} is no key: it is a character, or ctrl- with a letter or one of @[\\]^_"
                ),
            }
        }
        Ok(Self(keys))
    }
}

/// Looks for the keys in what is typed.
#[derive(Debug)]
pub(super) struct Watch {
    keys: DetachKeys,
    /// How many of them were typed last.
    typed: usize,
}

/// What to do with some input.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Verdict {
    /// To be passed on.
    pub(super) pass: Vec<u8>,
    /// The keys were typed: nothing is passed on after `pass`.
    pub(super) detach: bool,
}

impl Watch {
    /// Nothing was typed yet.
    pub(super) fn new(keys: DetachKeys) -> Self {
        Self { keys, typed: 0 }
    }

    /// Takes input. The beginning of the sequence is held back until it is clear that it is none.
    pub(super) fn take(&mut self, input: &[u8]) -> Verdict {
        let keys = &self.keys.0;
        let mut pass = Vec::new();
        for byte in input {
            // What was held back may end with another beginning of the sequence.
            while self.typed > 0 && keys[self.typed] != *byte {
                let held = &keys[..self.typed];
                let kept = (0..self.typed)
                    .rev()
                    .find(|n| held.ends_with(&keys[..*n]))
                    .unwrap_or(0);
                pass.extend_from_slice(&held[..self.typed - kept]);
                self.typed = kept;
            }
            if keys[self.typed] == *byte {
                self.typed += 1;
                if self.typed == keys.len() {
                    return Verdict { pass, detach: true };
                }
            } else {
                pass.push(*byte);
            }
        }
        Verdict {
            pass,
            detach: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(keys: &str) -> Watch {
        Watch::new(keys.parse().unwrap())
    }

    #[test]
    fn keys_are_dockers() {
        assert_eq!(
            "ctrl-p,ctrl-q".parse::<DetachKeys>().unwrap(),
            DetachKeys::default()
        );
        assert_eq!("a,ctrl-[".parse::<DetachKeys>().unwrap().0, [b'a', 0x1b]);
        for text in ["", "ctrl-", "ctrl-1", "ab", "a,,b", "é"] {
            assert!(text.parse::<DetachKeys>().is_err(), "{text}");
        }
    }

    #[test]
    fn sequence_over_two_reads_detaches() {
        let mut watch = watch("ctrl-p,ctrl-q");
        let first = watch.take(b"ls\x10");
        assert_eq!((first.pass.as_slice(), first.detach), (&b"ls"[..], false));
        let second = watch.take(b"\x11rest");
        assert_eq!((second.pass.as_slice(), second.detach), (&b""[..], true));
    }

    #[test]
    fn half_a_sequence_is_passed_on() {
        let mut watch = watch("a,a,b");
        assert_eq!(watch.take(b"aac").pass, b"aac");
        let again = watch.take(b"aaab");
        assert_eq!((again.pass.as_slice(), again.detach), (&b"a"[..], true));
    }

    proptest::proptest! {
        #[test]
        fn without_the_sequence_every_byte_is_passed_on(input: Vec<Vec<u8>>) {
            let mut watch = watch("ctrl-p,ctrl-q");
            let whole: Vec<u8> = input.concat();
            proptest::prop_assume!(!whole.windows(2).any(|w| w == [0x10, 0x11]));
            let mut passed: Vec<u8> = input.iter().flat_map(|i| watch.take(i).pass).collect();
            passed.extend_from_slice(&watch.keys.0[..watch.typed]);
            proptest::prop_assert_eq!(passed, whole);
        }
    }
}
