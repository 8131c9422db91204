//! Who a process runs as: ids from the spec, or names looked up in the container.

use std::io::Read as _;

use crate::error::{Error, Kind, Result};

/// Resolved ids of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
    /// From the password file.
    pub(crate) home: Option<String>,
}

/// Most bytes read of the container's password and group files.
const MAX_DATABASE: u64 = 4 << 20;

/// Reads one of the container's databases; a missing one is empty, as for Docker.
pub(crate) fn database(path: &str) -> String {
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_DATABASE).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The home directory of `uid`.
pub(crate) fn home(passwd: &str, uid: u32) -> Option<String> {
    accounts(passwd)
        .find(|account| account.uid == uid)
        .map(|account| account.home.to_owned())
        .filter(|home| !home.is_empty())
}

/// Resolves `user`, `name|uid[:group|gid]`, as an image's config has it.
pub(crate) fn resolve(user: &str, passwd: &str, group: &str) -> Result<Identity> {
    let (name, group_name) = match user.split_once(':') {
        Some((name, group)) => (name, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let number = name.parse::<u32>().ok();
    let by_name = accounts(passwd).find(|account| account.name == name);
    let account = by_name.or_else(|| accounts(passwd).find(|account| Some(account.uid) == number));
    let uid = match (&account, number, name) {
        (Some(account), ..) => account.uid,
        (None, Some(uid), _) => uid,
        (None, None, "") => 0,
        _ => {
            return Err(Error::new(
                Kind::Invalid,
                format!("unable to find user {name}: no matching entries in passwd file"),
            ));
        }
    };
    let gid = match group_name {
        Some(wanted) => groups(group)
            .find(|g| g.name == wanted)
            .map(|g| g.gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| {
                Error::new(
                    Kind::Invalid,
                    format!("unable to find group {wanted}: no matching entries in group file"),
                )
            })?,
        None => account.as_ref().map_or(0, |account| account.gid),
    };
    // A group named in the user's place stands alone, as Docker has it.
    let extra = match (&account, group_name) {
        (Some(account), None) => groups(group)
            .filter(|g| g.members.split(',').any(|m| m == account.name))
            .map(|g| g.gid)
            .collect(),
        _ => Vec::new(),
    };
    let home = account
        .map(|account| account.home.to_owned())
        .filter(|home| !home.is_empty());
    Ok(Identity {
        uid,
        gid,
        groups: extra,
        home,
    })
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

fn accounts(passwd: &str) -> impl Iterator<Item = Account<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Account {
            name,
            uid,
            gid,
            home: fields.nth(1).unwrap_or_default(),
        })
    })
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some(Group {
            name,
            gid,
            members: fields.next().unwrap_or_default(),
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nwww:x:33:34:w:/var/www:/bin/false\n1000:x:7:8::/odd:\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\naudio:x:29:root,www\nvideo:x:44:www\n";

    fn ids(user: &str) -> (u32, u32, Vec<u32>) {
        let i = resolve(user, PASSWD, GROUP).unwrap();
        (i.uid, i.gid, i.groups)
    }

    #[test]
    fn resolve_names_and_numbers_as_docker_does() {
        assert_eq!(ids("www"), (33, 34, vec![29, 44]));
        assert_eq!(ids("33"), (33, 34, vec![29, 44]));
        assert_eq!(ids("www:audio"), (33, 29, vec![]));
        assert_eq!(ids("12:13"), (12, 13, vec![]));
        assert_eq!(ids("12"), (12, 0, vec![]));
        assert_eq!(ids("12:audio"), (12, 29, vec![]));
        assert_eq!(ids("1000"), (7, 8, vec![]));
        assert_eq!(
            resolve("www", PASSWD, GROUP).unwrap().home.as_deref(),
            Some("/var/www")
        );
    }

    #[test]
    fn resolve_unknown_names_are_errors_with_the_name() {
        assert!(
            resolve("nobody", PASSWD, GROUP)
                .unwrap_err()
                .text
                .contains("nobody")
        );
        assert!(
            resolve("www:nogroup", PASSWD, GROUP)
                .unwrap_err()
                .text
                .contains("nogroup")
        );
    }

    #[test]
    fn home_of_uid_comes_from_its_line() {
        assert_eq!(home(PASSWD, 33).as_deref(), Some("/var/www"));
        assert_eq!(home(PASSWD, 99), None);
    }

    proptest! {
        #[test]
        fn resolve_any_files_never_panics(user in ".{0,20}", passwd in ".{0,200}", group in ".{0,200}") {
            let _ = resolve(&user, &passwd, &group);
        }
    }
}
