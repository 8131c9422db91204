//! Mount options, as mount(8) and the runtime spec name them.

use rustix::mount::{MountFlags, MountPropagationFlags};

use crate::error::{Error, Result};
use crate::sys::MountAttr;

/// Parsed options of one mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    /// For mount(2).
    pub(crate) flags: MountFlags,
    /// `bind` or `rbind`.
    pub(crate) bind: bool,
    /// `rbind`.
    pub(crate) recursive: bool,
    pub(crate) propagation: Option<MountPropagationFlags>,
    /// For mount_setattr(2): the same as `flags` for this mount alone.
    pub(crate) attr_set: u64,
    pub(crate) attr_clear: u64,
    /// `rro` and its like: for this mount and all below it.
    pub(crate) recursive_set: u64,
    pub(crate) recursive_clear: u64,
    /// Copy what the image has at the target into the new tmpfs.
    pub(crate) copy_up: bool,
    /// What remains is the file system's, comma-separated.
    pub(crate) data: String,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            flags: MountFlags::empty(),
            bind: false,
            recursive: false,
            propagation: None,
            attr_set: 0,
            attr_clear: 0,
            recursive_set: 0,
            recursive_clear: 0,
            copy_up: false,
            data: String::new(),
        }
    }
}

const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME: u64 = 0x70; // the field; 0 is relatime
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;

/// A per-mount flag: its name, its mount(2) flag, the attribute bits it clears and sets.
struct Flag(&'static str, MountFlags, u64, u64);

/// Names that set something; the opposite names clear it.
const FLAGS: [Flag; 9] = [
    Flag("ro", MountFlags::RDONLY, RDONLY, RDONLY),
    Flag("nosuid", MountFlags::NOSUID, NOSUID, NOSUID),
    Flag("nodev", MountFlags::NODEV, NODEV, NODEV),
    Flag("noexec", MountFlags::NOEXEC, NOEXEC, NOEXEC),
    Flag("noatime", MountFlags::NOATIME, ATIME, NOATIME),
    Flag("strictatime", MountFlags::STRICTATIME, ATIME, STRICTATIME),
    Flag("relatime", MountFlags::RELATIME, ATIME, 0),
    Flag("nodiratime", MountFlags::NODIRATIME, NODIRATIME, NODIRATIME),
    Flag(
        "nosymfollow",
        MountFlags::from_bits_retain(256),
        NOSYMFOLLOW,
        NOSYMFOLLOW,
    ),
];

const OPPOSITES: [(&str, &str); 9] = [
    ("rw", "ro"),
    ("suid", "nosuid"),
    ("dev", "nodev"),
    ("exec", "noexec"),
    ("atime", "noatime"),
    ("nostrictatime", "strictatime"),
    ("norelatime", "relatime"),
    ("diratime", "nodiratime"),
    ("symfollow", "nosymfollow"),
];

/// Flags of the whole file system, which mount_setattr doesn't know.
const SUPERBLOCK: [(&str, MountFlags, bool); 8] = [
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("lazytime", MountFlags::LAZYTIME, true),
    ("nolazytime", MountFlags::LAZYTIME, false),
    ("silent", MountFlags::SILENT, true),
    ("loud", MountFlags::SILENT, false),
    ("mand", MountFlags::from_bits_retain(64), true),
];

const PROPAGATION: [(&str, MountPropagationFlags); 8] = [
    ("private", MountPropagationFlags::PRIVATE),
    (
        "rprivate",
        MountPropagationFlags::PRIVATE.union(MountPropagationFlags::REC),
    ),
    ("shared", MountPropagationFlags::SHARED),
    (
        "rshared",
        MountPropagationFlags::SHARED.union(MountPropagationFlags::REC),
    ),
    ("slave", MountPropagationFlags::DOWNSTREAM),
    (
        "rslave",
        MountPropagationFlags::DOWNSTREAM.union(MountPropagationFlags::REC),
    ),
    ("unbindable", MountPropagationFlags::UNBINDABLE),
    (
        "runbindable",
        MountPropagationFlags::UNBINDABLE.union(MountPropagationFlags::REC),
    ),
];

/// The propagation that `name` means, for `rootfsPropagation` too.
pub(crate) fn propagation(name: &str) -> Option<MountPropagationFlags> {
    PROPAGATION
        .iter()
        .find(|(n, _)| *n == name)
        .map(|(_, flags)| *flags)
}

impl Options {
    /// Parses `options` in order: a later one wins.
    pub(crate) fn parse<'a>(options: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut parsed = Self::default();
        let mut data = Vec::new();
        for option in options {
            if option.contains('\0') || option.contains(',') {
                return Err(Error::invalid(format!(
                    "mount option {option:?} holds a comma or NUL"
                )));
            }
            if !parsed.take(option)? {
                data.push(option);
            }
        }
        parsed.data = data.join(",");
        Ok(parsed)
    }

    /// False if `option` is the file system's own.
    fn take(&mut self, option: &str) -> Result<bool> {
        match option {
            "defaults" | "" => {}
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            "idmap" | "ridmap" => {
                return Err(Error::unsupported(
                    "mount option idmap: id-mapped mounts are not supported",
                ));
            }
            "remount" => {
                return Err(Error::unsupported(
                    "mount option remount: there is nothing to mount again",
                ));
            }
            _ => {
                if let Some(flags) = propagation(option) {
                    self.propagation = Some(flags);
                } else if let Some((_, flag, on)) =
                    SUPERBLOCK.iter().find(|(name, ..)| *name == option)
                {
                    self.flags.set(*flag, *on);
                } else if let Some((flag, on)) = flag(option) {
                    self.flags.set(flag.1, on);
                    change(&mut self.attr_set, &mut self.attr_clear, flag, on);
                } else if let Some((flag, on)) = option.strip_prefix('r').and_then(flag) {
                    change(&mut self.recursive_set, &mut self.recursive_clear, flag, on);
                } else {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Attributes of this mount, to be changed after a bind.
    pub(crate) fn attr(&self) -> Option<MountAttr> {
        let attr = MountAttr {
            set: self.attr_set,
            clear: self.attr_clear,
            ..MountAttr::default()
        };
        (attr.set | attr.clear != 0).then_some(attr)
    }

    /// Attributes of this mount and all below.
    pub(crate) fn recursive_attr(&self) -> Option<MountAttr> {
        let attr = MountAttr {
            set: self.recursive_set,
            clear: self.recursive_clear,
            ..MountAttr::default()
        };
        (attr.set | attr.clear != 0).then_some(attr)
    }
}

fn flag(name: &str) -> Option<(&'static Flag, bool)> {
    let (name, on) = match OPPOSITES.iter().find(|(opposite, _)| *opposite == name) {
        Some((_, name)) => (*name, false),
        None => (name, true),
    };
    FLAGS
        .iter()
        .find(|flag| flag.0 == name)
        .map(|flag| (flag, on))
}

/// Bits that are set anew are cleared first where they are a field (atime); cleared bits must not be set.
fn change(set: &mut u64, clear: &mut u64, flag: &Flag, on: bool) {
    *set &= !flag.2;
    if on {
        *set |= flag.3;
    }
    if !on || flag.2 == ATIME {
        *clear |= flag.2;
    } else {
        *clear &= !flag.2;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(options: &[&str]) -> Options {
        Options::parse(options.iter().copied()).unwrap()
    }

    #[test]
    fn parse_flags_and_data_are_told_apart() {
        let o = parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]);
        assert_eq!(o.flags, MountFlags::NOSUID | MountFlags::STRICTATIME);
        assert_eq!(o.data, "mode=755,size=65536k");
    }

    #[test]
    fn parse_later_option_wins() {
        assert_eq!(parse(&["ro", "rw"]).flags, MountFlags::empty());
        let o = parse(&["rw", "ro"]);
        assert_eq!(
            (o.flags, o.attr_set, o.attr_clear & RDONLY),
            (MountFlags::RDONLY, RDONLY, 0)
        );
    }

    #[test]
    fn parse_recursive_names_are_kept_apart_from_plain_ones() {
        let o = parse(&["rbind", "rro", "rprivate", "relatime"]);
        assert!(o.bind && o.recursive);
        assert_eq!(
            (o.recursive_set, o.attr_set, o.attr_clear),
            (RDONLY, 0, ATIME)
        );
        assert_eq!(
            o.propagation,
            Some(MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        );
    }

    #[test]
    fn parse_comma_or_unsupported_is_refused() {
        assert!(Options::parse(["lowerdir=/a,upperdir=/b"]).is_err());
        assert!(Options::parse(["idmap"]).is_err());
        assert!(Options::parse(["remount"]).is_err());
    }

    proptest! {
        #[test]
        fn parse_any_options_never_sets_what_it_clears_except_fields(options in prop::collection::vec("[a-z=]{0,12}|ro|rw|noatime|relatime|rrw|rnoatime", 0..8)) {
            if let Ok(o) = Options::parse(options.iter().map(String::as_str)) {
                prop_assert_eq!(o.attr_set & o.attr_clear & !ATIME, 0);
                prop_assert_eq!(o.recursive_set & o.recursive_clear & !ATIME, 0);
            }
        }
    }
}
