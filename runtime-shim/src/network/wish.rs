//! What a container on networks is to get: written by the command line, read by the shim at each start.

use super::egress::Policy;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::str::FromStr;

/// The file in the sandbox's directory.
pub const FILE: &str = "network.json";
/// Thousands of ports fit.
const MAX_FILE: u64 = 1 << 20;

/// Everything about a container's networks.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Wish {
    /// Its interfaces: `eth0` and so on.
    pub attachments: Vec<Attachment>,
    /// What is published on the host, by way of the first network.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// Whom to ask for names that no container has; none: the host's resolvers.
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    /// Where it may send to; `None`: everywhere but to clouds' metadata.
    #[serde(default)]
    pub egress: Option<Policy>,
}

/// An interface on a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network's name.
    pub network: String,
    /// The interface's address.
    pub mac: Mac,
    /// Addresses asked for; none: the network chooses.
    #[serde(default)]
    pub ips: Vec<IpAddr>,
    /// Further names for the others on the network.
    #[serde(default)]
    pub aliases: Vec<String>,
}

/// A port of the container that the host has too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    /// On the host.
    pub host_port: u16,
    /// In the container.
    pub container_port: u16,
    /// "tcp" or "udp".
    pub protocol: String,
    /// The host's address; `None`: all of them.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = text
            .split([':', '-'])
            .map(|part| {
                u8::from_str_radix(part, 16)
                    .ok()
                    .filter(|_| part.len() == 2)
            })
            .collect();
        match bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            None => Err(format!(
                "{text:?} is not a MAC address like 02:42:ac:11:00:02"
            )),
            Some(bytes) if bytes[0] & 1 != 0 || bytes == [0; 6] => {
                Err(format!("{text} is no single machine's address"))
            }
            Some(bytes) => Ok(Self(bytes)),
        }
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl Mac {
    /// A new one: locally administered, of a single machine.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes: [u8; 6] = crate::random::bytes()?;
        bytes[0] = bytes[0] & 0xfc | 2;
        Ok(Self(bytes))
    }
}

/// The interface of the attachment with that number.
pub fn interface(number: usize) -> String {
    format!("eth{number}")
}

impl Wish {
    /// The wish of the sandbox in `dir`; `None`: it is on no network.
    pub fn read(dir: &Path) -> std::io::Result<Option<Self>> {
        match crate::files::read(&dir.join(FILE), MAX_FILE) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// What plugins get by their capabilities, for the attachment with that number.
    pub fn runtime(&self, number: usize) -> Map<String, Value> {
        let mut runtime = Map::new();
        if let Some(attachment) = self.attachments.get(number) {
            runtime.insert("mac".into(), json!(attachment.mac));
            if !attachment.ips.is_empty() {
                runtime.insert("ips".into(), json!(attachment.ips));
            }
        }
        if number == 0 && !self.ports.is_empty() {
            runtime.insert("portMappings".into(), json!(self.ports));
        }
        runtime
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_is_read_as_it_is_written() {
        let mac: Mac = "02:42:AC:11:00:02".parse().unwrap();
        assert_eq!(mac.to_string(), "02:42:ac:11:00:02");
        for bad in [
            "",
            "02:42",
            "01:00:00:00:00:01",
            "00:00:00:00:00:00",
            "2:42:ac:11:0:2",
            "02:42:ac:11:00:zz",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        let random = Mac::random().unwrap();
        assert_eq!(random.0[0] & 3, 2);
    }

    #[test]
    fn runtime_gives_ports_to_the_first_network_only() {
        let attachment = Attachment {
            network: "a".into(),
            mac: Mac([2, 0, 0, 0, 0, 1]),
            ips: vec!["10.0.0.9".parse().unwrap()],
            aliases: Vec::new(),
        };
        let port = Port {
            host_port: 80,
            container_port: 8080,
            protocol: "tcp".into(),
            host_ip: None,
        };
        let wish = Wish {
            attachments: vec![attachment.clone(), attachment],
            ports: vec![port],
            ..Wish::default()
        };
        let first = wish.runtime(0);
        assert_eq!(first["portMappings"][0]["hostPort"], 80);
        assert!(first["portMappings"][0].get("hostIP").is_none());
        assert_eq!(first["ips"][0], "10.0.0.9");
        assert!(!wish.runtime(1).contains_key("portMappings"));
    }
}
