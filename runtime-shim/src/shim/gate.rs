//! What lets a guest through to the addresses that the names of its policy have.
//!
//! Rules are the kernel's, in the sandbox's network namespace; here is kept which they are. An address stays for as long
//! as the container runs: programs keep what they were told for longer than they should. The oldest goes if there are
//! too many.

use crate::network::egress::{self, Rule};
use crate::network::named::NameRule;
use crate::network::netns;
use crate::network::user::DONE;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, SendFlags};
use std::collections::VecDeque;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Rules of one container: each is walked through for each new connection, and all are written for a new one.
const MAX_OPEN: usize = 512;
/// Between two changes: a guest and a resolver that are in league keep the host from nothing else.
const PACE: Duration = Duration::from_millis(50);
/// For those who write rules in a user's namespace: an emulated host may take seconds.
const PATIENCE: Timespec = Timespec {
    tv_sec: 30,
    tv_nsec: 0,
};

/// Who can change the rules.
pub(super) enum Keeper {
    /// We can, in the namespace that is mounted there.
    Us(PathBuf),
    /// The process that holds a user's namespaces, over this socket.
    Holder(OwnedFd),
}

/// The way through, for names.
pub(super) struct Gate {
    names: Vec<NameRule>,
    keeper: Arc<Keeper>,
    open: Mutex<Open>,
    complained: AtomicBool,
}

/// What is let through now.
#[derive(Default)]
struct Open {
    /// The one that was asked for last at the end.
    rules: VecDeque<Rule>,
    changed: Option<Instant>,
}

impl Gate {
    /// Closed for now; `None`: there are no names.
    pub(super) fn new(names: &[NameRule], keeper: Keeper) -> Option<Self> {
        (!names.is_empty()).then(|| Self {
            names: names.to_vec(),
            keeper: Arc::new(keeper),
            open: Mutex::default(),
            complained: AtomicBool::new(false),
        })
    }

    /// Whether the policy has that name.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.names.iter().any(|rule| rule.matches(name))
    }

    /// Whether it was asked this before: one complaint is enough.
    pub(super) fn has_complained(&self) -> bool {
        self.complained.swap(true, Ordering::Relaxed)
    }

    /// Lets the guest through to a name's addresses; afterwards it is.
    pub(super) async fn open(&self, name: &str, ips: &[IpAddr]) -> io::Result<()> {
        let mut open = self.open.lock().await;
        let (rules, new) = opened(&open.rules, &self.names, name, ips);
        if new {
            if let Some(changed) = open.changed {
                tokio::time::sleep_until(changed + PACE).await;
            }
            let (keeper, list) = (self.keeper.clone(), Vec::from(rules.clone()));
            let set = tokio::task::spawn_blocking(move || keeper.set(&list));
            set.await.map_err(io::Error::other)??;
            open.changed = Some(Instant::now());
        }
        open.rules = rules;
        Ok(())
    }
}

/// The rules when the addresses of a name are among them, and whether one of them is new.
fn opened(
    open: &VecDeque<Rule>,
    names: &[NameRule],
    name: &str,
    ips: &[IpAddr],
) -> (VecDeque<Rule>, bool) {
    let (mut rules, mut new) = (open.clone(), false);
    for rule in names.iter().filter(|rule| rule.matches(name)) {
        for ip in ips {
            let rule = rule.at(*ip);
            match rules.iter().position(|other| *other == rule) {
                Some(at) => drop(rules.remove(at)),
                None => new = true,
            }
            rules.push_back(rule);
        }
    }
    rules.drain(..rules.len().saturating_sub(MAX_OPEN));
    (rules, new)
}

impl Keeper {
    fn set(&self, rules: &[Rule]) -> io::Result<()> {
        match self {
            Self::Us(netns) => netns::enter(netns, || egress::set_named(rules)),
            Self::Holder(socket) => ask(socket, rules),
        }
    }
}

/// Has the holder do it: what it answers is what went wrong.
fn ask(socket: &OwnedFd, rules: &[Rule]) -> io::Result<()> {
    let text = serde_json::to_vec(rules)?;
    rustix::net::send(socket, &text, SendFlags::NOSIGNAL)?;
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    if rustix::event::poll(&mut fds, Some(&PATIENCE))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut said = [0; 1024];
    let (_, length) = rustix::net::recv(socket, &mut said, RecvFlags::empty())?;
    match &said[..length] {
        said if said == DONE.as_bytes() => Ok(()),
        [] => Err(io::Error::other("the process that holds the network ended")),
        said => Err(io::Error::other(String::from_utf8_lossy(said).into_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(list: &[&str]) -> Vec<NameRule> {
        list.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn ip(nth: u16) -> IpAddr {
        let [a, b] = nth.to_be_bytes();
        IpAddr::from([10, 0, a, b])
    }

    #[test]
    fn opened_has_a_rule_for_each_exception_and_address() {
        let names = names(&["a.example:443/tcp", "*.example:53", "b.example"]);
        let none = VecDeque::new();
        let (rules, new) = opened(&none, &names, "a.example", &[ip(1), ip(2)]);
        let shown: Vec<String> = rules.iter().map(Rule::to_string).collect();
        assert!(new);
        assert_eq!(
            shown,
            [
                "10.0.0.1/32:443-443/tcp",
                "10.0.0.2/32:443-443/tcp",
                "10.0.0.1/32:53-53",
                "10.0.0.2/32:53-53"
            ]
        );
        let (again, new) = opened(&rules, &names, "a.example", &[ip(2)]);
        assert!(!new && again.len() == 4);
        assert_eq!(
            opened(&none, &names, "c.com", &[ip(1)]),
            (none.clone(), false)
        );
    }

    #[test]
    fn opened_forgets_what_was_asked_for_longest_ago() {
        let names = names(&["a.example"]);
        let mut rules = VecDeque::new();
        for nth in 0..MAX_OPEN as u16 {
            rules = opened(&rules, &names, "a.example", &[ip(nth)]).0;
        }
        rules = opened(&rules, &names, "a.example", &[ip(0)]).0;
        rules = opened(&rules, &names, "a.example", &[ip(60_000)]).0;
        assert_eq!(rules.len(), MAX_OPEN);
        let has = |nth| rules.contains(&names[0].at(ip(nth)));
        assert!(has(0) && !has(1) && has(2) && has(60_000));
    }

    #[tokio::test]
    async fn open_that_the_keeper_fails_at_is_tried_again() {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let holder = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for answer in ["no such table", "done"] {
                let mut buffer = [0; 1024];
                let (_, length) =
                    rustix::net::recv(&theirs, &mut buffer, RecvFlags::empty()).unwrap();
                asked.push(buffer[..length].to_vec());
                rustix::net::send(&theirs, answer.as_bytes(), SendFlags::NOSIGNAL).unwrap();
            }
            asked
        });
        let gate = Gate::new(&names(&["a.example:443"]), Keeper::Holder(ours)).unwrap();
        let failed = gate.open("a.example", &[ip(1)]).await.unwrap_err();
        assert_eq!(failed.to_string(), "no such table");
        gate.open("a.example", &[ip(1)]).await.unwrap();
        gate.open("a.example", &[ip(1)]).await.unwrap();
        let asked = holder.join().unwrap();
        assert_eq!(asked[0], asked[1]);
        let rules: Vec<Rule> = serde_json::from_slice(&asked[1]).unwrap();
        assert_eq!(rules, ["10.0.0.1:443".parse().unwrap()]);
        assert!(gate.open("a.example", &[ip(2)]).await.is_err());
    }
}
