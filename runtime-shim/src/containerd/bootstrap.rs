//! What containerd says on the standard input of `start`, and in which form it wants the answer.
//!
//! There are three, and only the input tells the newest: up to 1.6 the answer is an address; from 1.7 on, which sets
//! `MAX_SHIM_VERSION`, it may be JSON; from 2.3 on all that the flags, the environment and the input said before comes as one
//! message (`containerd/runtime/bootstrap/v1/bootstrap.proto`), and so does the answer.

use super::args::Args;
use anyhow::{Context, bail, ensure};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use protobuf::UnknownValueRef;
use protobuf::well_known_types::empty::Empty;
use serde_json::json;
use std::io::Read;

/// Where containerd forwards events to; set by it, up to 2.2.
const EVENTS: &str = "TTRPC_ADDRESS";
/// Set by a containerd that understands JSON.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
/// More is no containerd's.
const MAX_INPUT: u64 = 4 << 20;
/// Versions of the Task API, all of which are served: the highest that any containerd takes that reads JSON, or the message.
const TASK_API_IN_JSON: i32 = 2;
const TASK_API_IN_MESSAGE: i32 = 3;
/// `runtimeoptions.v1.Options`: how containerd hands the table `options` of a runtime that is not runc's to it. Its package had
/// two names.
const OPTIONS: [&str; 2] = [
    "runtimeoptions.v1.Options",
    "containerd.runtimeoptions.v1.Options",
];

/// How the answer is to be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// The address alone.
    Address,
    /// `{"version":…,"address":…,"protocol":…}`.
    Json,
    /// A `BootstrapResult`.
    Message,
}

impl Form {
    /// What is to be printed of a shim that listens at `address`.
    pub(super) fn answer(self, address: &str) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Self::Address => address.as_bytes().to_vec(),
            Self::Json => {
                json!({"version": TASK_API_IN_JSON, "address": address, "protocol": "ttrpc"})
                    .to_string()
                    .into_bytes()
            }
            Self::Message => BootstrapResult {
                version: TASK_API_IN_MESSAGE,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..Default::default()
            }
            .write_to_bytes()
            .context("can't write the answer")?,
        })
    }
}

/// What was said, whatever its form.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Bootstrap {
    pub(super) form: Form,
    /// The ttrpc socket for events; empty: none.
    pub(super) events: String,
    /// The options of the runtime.
    pub(super) options: Options,
}

/// `runtimeoptions.v1.Options`, as far as it matters; empty: not given.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    /// Field 2: a configuration file's path.
    pub(super) config_path: String,
    /// Field 3: a configuration file's content.
    pub(super) config_body: String,
}

/// Reads standard input to its end.
pub(super) fn read(args: &Args) -> anyhow::Result<Bootstrap> {
    let mut input = Vec::new();
    let stdin = std::io::stdin().lock();
    stdin
        .take(MAX_INPUT + 1)
        .read_to_end(&mut input)
        .context("can't read what containerd says on standard input")?;
    ensure!(
        input.len() as u64 <= MAX_INPUT,
        "containerd says more than {MAX_INPUT} bytes on standard input"
    );
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    parse(&input, args, variable)
}

fn parse(
    input: &[u8],
    args: &Args,
    variable: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Bootstrap> {
    // Older options are another message, which can be read as this one: only what names this very shim is this one.
    let params = BootstrapParams::parse_from_bytes(input).ok();
    let params = params.filter(|p| p.instance_id == args.id && p.namespace == args.namespace);
    if let Some(params) = params {
        let values = params.extensions.into_iter();
        let values = values.filter_map(|extension| extension.value.into_option());
        let options = values.map(|any| options(&any)).find_map(Result::transpose);
        return Ok(Bootstrap {
            form: Form::Message,
            events: params.containerd_ttrpc_address,
            options: options.transpose()?.unwrap_or_default(),
        });
    }
    let options = match input {
        [] => Options::default(),
        input => {
            let any = Any::parse_from_bytes(input)
                .context("what containerd says on standard input is no message of its")?;
            let given = options(&any)?;
            given.with_context(|| {
                format!(
                    "options of the type {:?} are not for this runtime",
                    any.type_url
                )
            })?
        }
    };
    Ok(Bootstrap {
        form: match variable(MAX_VERSION) {
            Some(_) => Form::Json,
            None => Form::Address,
        },
        events: variable(EVENTS).unwrap_or_default(),
        options,
    })
}

/// The runtime's options; `None`: another message.
fn options(any: &Any) -> anyhow::Result<Option<Options>> {
    let kind = any.type_url.rsplit('/').next().unwrap_or_default();
    if !kind.is_empty() && !OPTIONS.contains(&kind) {
        return Ok(None);
    }
    let fields = Empty::parse_from_bytes(&any.value).context("the runtime's options are broken")?;
    let mut options = Options::default();
    for (number, value) in fields.special_fields.unknown_fields().iter() {
        let place = match number {
            2 => &mut options.config_path,
            3 => &mut options.config_body,
            _ => continue,
        };
        let UnknownValueRef::LengthDelimited(bytes) = value else {
            bail!("the runtime's options are broken: field {number} is no text");
        };
        *place = String::from_utf8(bytes.to_vec())
            .with_context(|| format!("field {number} of the runtime's options is no text"))?;
    }
    Ok(Some(options))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::args::Action;
    use containerd_shim_protos::bootstrap_api::Extension;

    fn args() -> Args {
        Args {
            namespace: "k8s.io".into(),
            id: "abc".into(),
            action: Action::Start,
        }
    }

    fn said(input: &[u8], variables: &[(&str, &str)]) -> anyhow::Result<Bootstrap> {
        parse(input, &args(), |name| {
            let found = variables.iter().find(|(n, _)| *n == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    /// Field 2 is "/c.toml", field 3 "cpus = 2".
    fn options() -> Any {
        Any {
            type_url: "types.containerd.io/runtimeoptions.v1.Options".into(),
            value: b"\x0a\x01t\x12\x07/c.toml\x1a\x08cpus = 2".to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn oldest_form_is_the_address() {
        let said = said(b"", &[("TTRPC_ADDRESS", "/c.ttrpc")]).unwrap();
        assert_eq!(
            (said.form, said.events.as_str()),
            (Form::Address, "/c.ttrpc")
        );
        assert_eq!(said.form.answer("unix:///a").unwrap(), b"unix:///a");
    }

    #[test]
    fn json_is_for_those_who_know_versions() {
        let input = options().write_to_bytes().unwrap();
        let said = said(&input, &[("MAX_SHIM_VERSION", "2")]).unwrap();
        assert_eq!(said.options.config_path, "/c.toml");
        assert_eq!(said.options.config_body, "cpus = 2");
        let answer = said.form.answer("unix:///a").unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        assert_eq!(
            answer,
            json!({"version": 2, "address": "unix:///a", "protocol": "ttrpc"})
        );
    }

    #[test]
    fn message_is_answered_by_a_message() {
        let params = BootstrapParams {
            instance_id: "abc".into(),
            namespace: "k8s.io".into(),
            containerd_ttrpc_address: "/new.ttrpc".into(),
            extensions: vec![Extension {
                value: Some(options()).into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let input = params.write_to_bytes().unwrap();
        let old = [("TTRPC_ADDRESS", "/old.ttrpc"), ("MAX_SHIM_VERSION", "2")];
        let said = said(&input, &old).unwrap();
        assert_eq!(
            (said.form, said.events.as_str()),
            (Form::Message, "/new.ttrpc")
        );
        assert_eq!(said.options.config_path, "/c.toml");
        let answer = said.form.answer("unix:///a").unwrap();
        let answer = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!(
            (
                answer.version,
                answer.address.as_str(),
                answer.protocol.as_str()
            ),
            (3, "unix:///a", "ttrpc")
        );
    }

    #[test]
    fn options_of_runc_and_nonsense_are_refused() {
        let runc = Any {
            type_url: "containerd.runc.v1.Options".into(),
            ..Default::default()
        };
        let error = said(&runc.write_to_bytes().unwrap(), &[]).unwrap_err();
        assert!(error.to_string().contains("containerd.runc.v1.Options"));
        let mut broken = options();
        broken.value = b"\x10\x01".to_vec();
        let broken = broken.write_to_bytes().unwrap();
        for input in [b"\xff\xff\xff".as_slice(), &broken] {
            assert!(said(input, &[]).is_err(), "{input:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn anything_is_understood_or_refused(input in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = said(&input, &[]);
        }
    }
}
