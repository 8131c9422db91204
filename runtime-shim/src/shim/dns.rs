//! Messages of DNS (RFC 1035, section 4): what a guest asks, and what resolvers answer. Both may be hostile: everything
//! is bounded, and what makes no sense is nothing.

use std::net::IpAddr;

/// Before the question.
pub(super) const HEADER: usize = 12;
pub(super) const TYPE_A: u16 = 1;
pub(super) const TYPE_AAAA: u16 = 28;
pub(super) const CLASS_IN: u16 = 1;
pub(super) const NO_ERROR: u8 = 0;
pub(super) const SERVER_FAILED: u8 = 2;
/// There is no such name.
pub(super) const NO_NAME: u8 = 3;
pub(super) const REFUSED: u8 = 5;
/// Of a name, with the lengths of its labels.
const MAX_NAME: usize = 255;
/// What two of its bits say is a reference to elsewhere.
const MAX_LABEL: usize = 63;
/// Of an answer's addresses so many are taken: no client tries more.
const MAX_ADDRESSES: usize = 32;
/// Of an answer so many records are looked at: addresses, and other names on the way to them.
const MAX_RECORDS: u16 = 256;

/// What a message asks.
#[derive(Debug, PartialEq)]
pub(super) struct Question {
    /// In small letters.
    pub(super) name: String,
    pub(super) kind: u16,
    pub(super) class: u16,
    /// Where it ends in the message.
    end: usize,
}

fn word(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

fn is_answer(message: &[u8]) -> Option<bool> {
    Some(word(message, 2)? & 0x8000 != 0)
}

/// A message that asks for a name's records of a kind, without a number of its own; `None`: it is no name.
pub(super) fn question(name: &str, kind: u16) -> Option<Vec<u8>> {
    // Recursion is desired; one question.
    let mut message = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        if label.is_empty() || label.len() > MAX_LABEL {
            return None;
        }
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    message.push(0);
    if message.len() > HEADER + MAX_NAME {
        return None;
    }
    message.extend(kind.to_be_bytes());
    message.extend(CLASS_IN.to_be_bytes());
    Some(message)
}

impl Question {
    /// What a question asks; `None`: it is none.
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        match is_answer(message)? {
            true => None,
            false => Self::read(message),
        }
    }

    fn read(message: &[u8]) -> Option<Self> {
        if word(message, 4)? != 1 {
            return None;
        }
        let (mut at, mut labels) = (HEADER, Vec::new());
        loop {
            let length = usize::from(*message.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            // A reference to elsewhere makes no sense here.
            if length > MAX_LABEL || at + length > HEADER + MAX_NAME {
                return None;
            }
            let label = String::from_utf8_lossy(message.get(at..at + length)?);
            labels.push(label.to_ascii_lowercase());
            at += length;
        }
        Some(Self {
            name: labels.join("."),
            kind: word(message, at)?,
            class: word(message, at + 2)?,
            end: at + 4,
        })
    }

    /// A reply with nothing but the question.
    pub(super) fn reply(&self, message: &[u8], code: u8, answers: u16) -> Vec<u8> {
        let mut reply = message[..self.end].to_vec();
        // An answer, with authority; what was desired of recursion is kept, and there is some.
        reply[2] = reply[2] & 0x79 | 0x84;
        reply[3] = 0x80 | code;
        reply[4..HEADER].fill(0);
        reply[5] = 1;
        reply[6..8].copy_from_slice(&answers.to_be_bytes());
        reply
    }

    /// A reply with those of the addresses that are asked for.
    pub(super) fn answered(&self, message: &[u8], ips: &[IpAddr], ttl: u32) -> Vec<u8> {
        let bytes = |ip: &IpAddr| match (ip, self.kind) {
            (IpAddr::V4(ip), TYPE_A) => Some(ip.octets().to_vec()),
            (IpAddr::V6(ip), TYPE_AAAA) => Some(ip.octets().to_vec()),
            _ => None,
        };
        let all: Vec<Vec<u8>> = ips.iter().filter_map(bytes).collect();
        let mut reply = self.reply(message, NO_ERROR, all.len() as u16);
        for ip in all {
            // The name is the question's.
            reply.extend([0xc0, HEADER as u8]);
            reply.extend(self.kind.to_be_bytes());
            reply.extend(CLASS_IN.to_be_bytes());
            reply.extend(ttl.to_be_bytes());
            reply.extend((ip.len() as u16).to_be_bytes());
            reply.extend(ip);
        }
        reply
    }
}

/// What of an answer matters for the way to a name.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Answer {
    /// How it went.
    pub(super) code: u8,
    /// Of the kind that was asked for, by whatever other names the question's leads to.
    pub(super) ips: Vec<IpAddr>,
    /// For how many seconds the first of them to change is good.
    pub(super) ttl: u32,
}

impl Answer {
    /// What a message says of a question; `None`: it is no whole answer to it.
    pub(super) fn parse(message: &[u8], asked: &Question) -> Option<Self> {
        let question = Question::read(message).filter(|_| is_answer(message) == Some(true))?;
        if (&question.name, question.kind, question.class) != (&asked.name, asked.kind, asked.class)
        {
            return None;
        }
        let mut answer = Self {
            code: (word(message, 2)? & 0x000f) as u8,
            ips: Vec::new(),
            ttl: u32::MAX,
        };
        let was_cut = word(message, 2)? & 0x0200 != 0;
        let mut at = question.end;
        for _ in 0..word(message, 6)?.min(MAX_RECORDS) {
            let Some(record) = Record::read(message, at) else {
                // Of one that didn't fit, what did.
                return was_cut.then_some(answer);
            };
            at = record.end;
            if let Some(ip) = record.address(asked) {
                answer.ips.push(ip);
                answer.ttl = answer.ttl.min(record.ttl);
            }
            if answer.ips.len() == MAX_ADDRESSES {
                break;
            }
        }
        Some(answer)
    }
}

/// One of an answer's.
struct Record<'a> {
    kind: u16,
    class: u16,
    ttl: u32,
    data: &'a [u8],
    /// Where it ends in the message.
    end: usize,
}

impl<'a> Record<'a> {
    fn read(message: &'a [u8], at: usize) -> Option<Self> {
        let at = behind_name(message, at)?;
        let length = usize::from(word(message, at + 8)?);
        let ttl = message.get(at + 4..)?.first_chunk()?;
        let (begin, end) = (at + 10, at + 10 + length);
        Some(Self {
            kind: word(message, at)?,
            class: word(message, at + 2)?,
            ttl: u32::from_be_bytes(*ttl),
            data: message.get(begin..end)?,
            end,
        })
    }

    fn address(&self, asked: &Question) -> Option<IpAddr> {
        if (self.kind, self.class) != (asked.kind, asked.class) {
            return None;
        }
        match self.kind {
            TYPE_A => Some(IpAddr::from(<[u8; 4]>::try_from(self.data).ok()?)),
            TYPE_AAAA => Some(IpAddr::from(<[u8; 16]>::try_from(self.data).ok()?)),
            _ => None,
        }
    }
}

/// Where a name ends: with an empty label, or with a reference, which isn't followed.
fn behind_name(message: &[u8], begin: usize) -> Option<usize> {
    let mut at = begin;
    loop {
        let length = usize::from(*message.get(at)?);
        match length {
            0 => return Some(at + 1),
            0xc0.. => return Some(at + 2),
            1..=MAX_LABEL if at - begin < MAX_NAME => at += 1 + length,
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A question for a name, with the number 0x0707.
    fn message(name: &str, kind: u16) -> Vec<u8> {
        let mut message = question(name, kind).unwrap();
        message[..2].fill(7);
        message
    }

    fn parsed(name: &str, kind: u16) -> (Vec<u8>, Question) {
        let message = message(name, kind);
        let question = Question::parse(&message).unwrap();
        (message, question)
    }

    fn ips() -> [IpAddr; 2] {
        ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()]
    }

    #[test]
    fn question_is_answered_with_addresses_of_its_kind() {
        let (asked, question) = parsed("Web.Net", TYPE_A);
        assert_eq!((&*question.name, question.end), ("web.net", asked.len()));
        let reply = question.answered(&asked, &ips(), 0);
        assert_eq!(reply[..8], [7, 7, 0x85, 0x80, 0, 1, 0, 1]);
        assert!(reply.ends_with(&[0, 4, 10, 0, 0, 2]));
        let mail = Question {
            kind: 15,
            ..question
        };
        assert_eq!(mail.answered(&asked, &ips(), 0)[6..8], [0, 0]);
    }

    #[test]
    fn question_that_is_none_is_refused() {
        let asked = message("web", TYPE_A);
        for end in 0..asked.len() {
            assert_eq!(Question::parse(&asked[..end]), None, "{end}");
        }
        let mut answer = asked.clone();
        answer[2] |= 0x80;
        assert_eq!(Question::parse(&answer), None);
        let mut reference = asked.clone();
        reference[HEADER] = 0xc0;
        assert_eq!(Question::parse(&reference), None);
    }

    #[test]
    fn question_for_what_is_no_name_is_none() {
        for name in ["", ".", "a..b", &"a".repeat(64), &"a.".repeat(140)] {
            assert_eq!(question(name, TYPE_A), None, "{name}");
        }
    }

    #[test]
    fn answer_has_the_addresses_of_the_kind_asked_for() {
        for (kind, ip) in [(TYPE_A, ips()[0]), (TYPE_AAAA, ips()[1])] {
            let (asked, question) = parsed("web.net", kind);
            let said = question.answered(&asked, &ips(), 30);
            let answer = Answer::parse(&said, &question).unwrap();
            assert_eq!((answer.code, answer.ttl), (NO_ERROR, 30));
            assert_eq!(answer.ips, [ip]);
        }
        let (asked, question) = parsed("web.net", TYPE_A);
        let none = question.reply(&asked, NO_NAME, 0);
        assert_eq!(Answer::parse(&none, &question).unwrap().code, NO_NAME);
    }

    #[test]
    fn answer_by_way_of_another_name_has_its_addresses() {
        let (asked, question) = parsed("web.net", TYPE_A);
        let mut said = question.reply(&asked, NO_ERROR, 2);
        // CNAME: b, then web.net's own.
        said.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 3, 1, b'b', 0]);
        said.extend([1, b'b', 0, 0, 1, 0, 1, 0, 0, 0, 7, 0, 4, 10, 0, 0, 9]);
        let answer = Answer::parse(&said, &question).unwrap();
        assert_eq!(answer.ips, [IpAddr::from([10, 0, 0, 9])]);
        assert_eq!(answer.ttl, 7);
    }

    #[test]
    fn answer_to_something_else_or_cut_short_is_none() {
        let (asked, question) = parsed("web.net", TYPE_A);
        let said = question.answered(&asked, &ips(), 30);
        assert_eq!(Answer::parse(&asked, &question), None);
        for (name, kind) in [("web.org", TYPE_A), ("web.net", TYPE_AAAA)] {
            let (_, other) = parsed(name, kind);
            assert_eq!(Answer::parse(&said, &other), None, "{name}");
        }
        for end in 0..said.len() {
            assert_eq!(Answer::parse(&said[..end], &question), None, "{end}");
        }
        // One that says that it was cut has what is there.
        let mut cut = said[..said.len() - 1].to_vec();
        cut[2] |= 2;
        assert!(Answer::parse(&cut, &question).unwrap().ips.is_empty());
    }

    #[test]
    fn answer_with_addresses_of_a_wrong_length_or_endless_names_has_none() {
        let (asked, question) = parsed("web.net", TYPE_A);
        let mut said = question.reply(&asked, NO_ERROR, 1);
        said.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 3, 10, 0, 0]);
        assert!(Answer::parse(&said, &question).unwrap().ips.is_empty());
        let mut said = question.reply(&asked, NO_ERROR, 1);
        said.extend([63; 2000]);
        assert_eq!(Answer::parse(&said, &question), None);
        let many = vec![ips()[0]; 1000];
        let said = question.answered(&asked, &many, 1);
        let answer = Answer::parse(&said, &question).unwrap();
        assert_eq!(answer.ips.len(), MAX_ADDRESSES);
    }

    proptest::proptest! {
        #[test]
        fn message_of_anything_never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
            if let Some(question) = Question::parse(&bytes) {
                let ips = [IpAddr::from([10, 0, 0, 1])];
                assert!(question.answered(&bytes, &ips, 0).len() >= question.end);
            }
        }

        #[test]
        fn answer_of_anything_is_bounded(records in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400), count: u16, flags: u8) {
            let (asked, question) = parsed("web.net", TYPE_A);
            let mut said = question.reply(&asked, NO_ERROR, count);
            said[3] = flags;
            said.extend(records);
            if let Some(answer) = Answer::parse(&said, &question) {
                assert!(answer.ips.len() <= MAX_ADDRESSES && answer.code < 16);
            }
        }
    }
}
