//! The resolver of a sandbox on networks: knows the containers beside it, and asks the host's resolvers for the rest.
//!
//! The agent passes on what the guest's programs ask, so all of it is hostile: one question a message, bounded, and
//! only so many at a time.
//!
//! Where names are exceptions of an egress policy, whatever addresses the guest is told of one of them are let through
//! before it is told: what it knows and what it may is the same. These questions are our own and their answers are
//! taken apart; nothing else of them reaches the guest.

use super::dns::{self, Answer, Question};
use super::gate::Gate;
use crate::files;
use crate::network;
use crate::network::cni::{self, Outcome};
use crate::network::egress::Policy;
use crate::network::wish::{self, Wish};
use crate::network::{named, user};
use crate::state::{Container, DEFAULT_NAMESPACE, StateRoot};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UdpSocket, UnixStream};
use tokio::sync::{Semaphore, mpsc};

/// Questions that are answered at the same time; further ones wait, and their askers with them.
const AT_ONCE: usize = 64;
/// A question has a name of at most 255 bytes, and little else.
const MAX_QUESTION: usize = 4096;
/// As clients offer to take at most.
const MAX_ANSWER: usize = 4096;
/// Before the next resolver is asked; clients wait for five seconds.
const PATIENCE: Duration = Duration::from_millis(2500);
/// As many as resolv.conf has.
const MAX_RESOLVERS: usize = 3;
/// Names come and go with containers.
const TTL: u32 = 0;
/// Seconds that the guest may keep an address of a name that is an exception: it soon learns of others.
const MAX_TTL: u32 = 60;

/// What it goes by.
pub(super) struct Names {
    pub(super) state_dir: PathBuf,
    /// The sandbox's own.
    pub(super) wish: Wish,
    /// For the names that are exceptions of its policy, if there are any.
    pub(super) gate: Option<Gate>,
}

/// Serves on our end of the stream until the guest's is gone.
pub(super) fn serve(names: Names, stream: OwnedFd) -> io::Result<()> {
    let stream = std::os::unix::net::UnixStream::from(stream);
    stream.set_nonblocking(true)?;
    let (mut questions, mut answers) = UnixStream::from_std(stream)?.into_split();
    let (tell, mut told) = mpsc::channel::<Vec<u8>>(AT_ONCE);
    tokio::spawn(async move {
        while let Some(answer) = told.recv().await {
            let mut frame = (answer.len() as u16).to_be_bytes().to_vec();
            frame.extend(answer);
            if answers.write_all(&frame).await.is_err() {
                return;
            }
        }
    });
    let names = Arc::new(names);
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    tokio::spawn(async move {
        while let Ok(length) = questions.read_u16().await {
            let mut question = vec![0; usize::from(length)];
            let read = questions.read_exact(&mut question).await;
            if read.is_err() || question.len() > MAX_QUESTION {
                return;
            }
            let Ok(permit) = at_once.clone().acquire_owned().await else {
                return;
            };
            let (names, tell) = (names.clone(), tell.clone());
            tokio::spawn(async move {
                if let Some(answer) = names.answer(question).await {
                    let _ = tell.send(answer).await;
                }
                drop(permit);
            });
        }
    });
    Ok(())
}

impl Names {
    /// The answer to a message; `None`: it is no question.
    async fn answer(&self, message: Vec<u8>) -> Option<Vec<u8>> {
        let question = Question::parse(&message)?;
        let beside = match question.class == dns::CLASS_IN {
            true => self.find(&question.name),
            false => None,
        };
        if let Some(gate) = &self.gate
            && gate.knows(&question.name)
        {
            return Some(
                self.answer_exception(gate, &question, &message, beside)
                    .await,
            );
        }
        if let Some(ips) = beside {
            return Some(question.answered(&message, &ips, TTL));
        }
        let mut refused = false;
        for resolver in self.resolvers() {
            if !self.may_ask(resolver) {
                refused = true;
            } else if let Ok(answer) = ask(resolver, &message).await {
                return Some(answer);
            }
        }
        let code = match refused {
            true => dns::REFUSED,
            false => dns::SERVER_FAILED,
        };
        Some(question.reply(&message, code, 0))
    }

    /// The answer for a name that the guest may send to. `beside`: a container has that name.
    async fn answer_exception(
        &self,
        gate: &Gate,
        question: &Question,
        message: &[u8],
        beside: Option<Vec<IpAddr>>,
    ) -> Vec<u8> {
        let found = match beside {
            Some(ips) => Some(Answer {
                code: dns::NO_ERROR,
                ips,
                ttl: TTL,
            }),
            None => self.resolve(question).await,
        };
        let Some(mut answer) = found else {
            return question.reply(message, dns::SERVER_FAILED, 0);
        };
        answer.ips.retain(|ip| named::may_lead_to(*ip));
        if let Err(error) = gate.open(&question.name, &answer.ips).await {
            // The guest can ask again and again.
            if !gate.has_complained() {
                eprintln!("casemate shim: can't let names through: {error}");
            }
            return question.reply(message, dns::SERVER_FAILED, 0);
        }
        match answer.code {
            dns::NO_ERROR => question.answered(message, &answer.ips, answer.ttl.min(MAX_TTL)),
            code => question.reply(message, code, 0),
        }
    }

    /// Asks the resolvers for a name's addresses; nothing else is asked for a name that is an exception.
    async fn resolve(&self, question: &Question) -> Option<Answer> {
        let asked = dns::question(&question.name, question.kind)?;
        if question.class != dns::CLASS_IN
            || ![dns::TYPE_A, dns::TYPE_AAAA].contains(&question.kind)
        {
            return Some(Answer::default());
        }
        for resolver in self.resolvers() {
            let answer = ask(resolver, &asked).await.ok();
            let answer = answer.and_then(|answer| Answer::parse(&answer, question));
            match answer {
                Some(answer) if [dns::NO_ERROR, dns::NO_NAME].contains(&answer.code) => {
                    return Some(answer);
                }
                _ => {}
            }
        }
        None
    }

    /// The addresses of the container that is called so on a network of ours.
    fn find(&self, name: &str) -> Option<Vec<IpAddr>> {
        let root = StateRoot::open(&self.state_dir, DEFAULT_NAMESPACE).ok()?;
        let containers = root.containers().ok()?;
        let mut alive = containers.iter().filter(|c| c.status.state.is_alive());
        alive.find_map(|container| self.addresses(container, name))
    }

    /// A container's addresses on networks of ours, if that is its name there.
    fn addresses(&self, container: &Container, name: &str) -> Option<Vec<IpAddr>> {
        let wish = Wish::read(&container.dir).ok().flatten()?;
        let mut ips = Vec::new();
        for (number, attachment) in wish.attachments.iter().enumerate() {
            let mut ours = self.wish.attachments.iter();
            // Of those who have passt nobody can reach another.
            let apart = attachment.network == user::NAME;
            if apart || !ours.any(|own| own.network == attachment.network) {
                continue;
            }
            let suffix = format!(".{}", attachment.network.to_ascii_lowercase());
            let name = name.strip_suffix(&suffix).unwrap_or(name);
            let is = |other: &str| other.eq_ignore_ascii_case(name);
            let meta = &container.meta;
            if !is(&meta.name)
                && !is(&meta.id[..meta.id.len().min(12)])
                && !attachment.aliases.iter().any(|alias| is(alias))
            {
                continue;
            }
            let result = network::result(&container.dir, &wish::interface(number));
            let outcome = result.and_then(|result| serde_json::from_value(result).ok());
            let outcome: Outcome = outcome.unwrap_or_default();
            ips.extend(outcome.ips.iter().filter_map(cni::Ip::parts).map(|ip| ip.0));
        }
        (!ips.is_empty()).then_some(ips)
    }

    /// Those of `--dns`, else the host's as they are now.
    fn resolvers(&self) -> Vec<IpAddr> {
        const MAX_FILE: u64 = 64 << 10;
        if !self.wish.dns.is_empty() {
            return self.wish.dns.iter().copied().take(MAX_RESOLVERS).collect();
        }
        let text = files::read_text("/etc/resolv.conf".as_ref(), MAX_FILE).unwrap_or_default();
        text.lines()
            .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
            .filter_map(|ip| ip.trim().parse().ok())
            .take(MAX_RESOLVERS)
            .collect()
    }

    /// A guest that may send nowhere must not do so in questions either.
    fn may_ask(&self, resolver: IpAddr) -> bool {
        let policy = self.wish.egress.as_ref();
        policy.is_none_or(|policy| !policy.deny || Policy::allows(policy, resolver, 53, "udp"))
    }
}

/// Asks a resolver in our own name.
async fn ask(resolver: IpAddr, message: &[u8]) -> io::Result<Vec<u8>> {
    let any: SocketAddr = match resolver {
        IpAddr::V4(_) => ([0; 4], 0).into(),
        IpAddr::V6(_) => ([0; 16], 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect((resolver, 53)).await?;
    // Not to be guessed by one who would answer in the resolver's place.
    let id: [u8; 2] = crate::random::bytes()?;
    let mut question = message.to_vec();
    question[..2].copy_from_slice(&id);
    socket.send(&question).await?;
    let mut answer = vec![0; MAX_ANSWER];
    let received = async {
        loop {
            let length = socket.recv(&mut answer).await?;
            if length >= dns::HEADER && answer[..2] == id {
                return io::Result::Ok(length);
            }
        }
    };
    let length = tokio::time::timeout(PATIENCE, received).await??;
    answer.truncate(length);
    answer[..2].copy_from_slice(&message[..2]);
    Ok(answer)
}
