//! `casemate commit`: a container's changes become a layer of a new image.

use super::tools::Workshop;
use super::{containers, exec, images, output, progress};
use crate::settings::Settings;
use crate::state::{Meta, now_ns};
use crate::times;
use anyhow::{Context, bail};
use casemate_image::{LoadOptions, parse_reference};
use casemate_protocol::tool::Tool;
use clap::Args;
use serde_json::{Value, json};

/// What the start of a container adds to its environment.
const ADDED: [&str; 2] = ["HOSTNAME=", "TERM="];

/// `casemate commit`
#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    /// Who made it
    #[arg(short, long, default_value = "")]
    author: String,
    /// Change the image's configuration by a line of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR
    #[arg(short, long, value_name = "INSTRUCTION")]
    change: Vec<String>,
    /// What was done
    #[arg(short, long, default_value = "")]
    message: String,
    /// Freeze the container meanwhile
    #[arg(short, long, default_value_t = true, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pause: bool,
    /// Name or id
    container: String,
    /// The new image's name
    name: Option<String>,
}

/// `casemate commit`
pub(super) async fn commit(settings: &Settings, args: &CommitArgs) -> anyhow::Result<()> {
    let name = args.name.as_deref().map(parse_reference).transpose()?;
    let root = containers::state(settings)?;
    let container = root.find(&args.container)?;
    let spec = exec::spec_of(&container)?;
    let store = images::store(settings)?;
    let image_id = &container.meta.image_id;
    let base = store.find(image_id)?;
    let base = base.with_context(|| format!("the image {image_id} is gone"))?;
    for change in &args.change {
        apply(&mut json!({}), change).with_context(|| format!("--change {change:?}"))?;
    }
    let created = times::rfc3339(now_ns());
    let history = json!({
        "created": created, "author": args.author, "comment": args.message,
        "created_by": container.meta.command.join(" "),
    });
    let (author, changes) = (args.author.clone(), args.change.clone());
    let meta = container.meta.clone();
    let edit = move |document: &mut Value| {
        document["created"] = created.into();
        document["author"] = author.into();
        let config = &mut document["config"];
        as_run(config, &meta, &spec);
        for change in &changes {
            let _ = apply(config, change); // each was tried above
        }
        match document["history"].as_array_mut() {
            Some(all) => all.push(history),
            None => document["history"] = json!([history]),
        }
    };
    let options = LoadOptions {
        limits: images::limits(settings)?,
        progress: progress::choose(true),
        ..LoadOptions::default()
    };

    let workshop = Workshop::open(settings, &root, &args.container).await?;
    let mount_points = workshop.mount_points()?;
    let paused = args.pause && workshop.pause().await?;
    let take = move |layer| Ok(store.derive(&base, layer, edit, name.as_ref(), &options)?);
    let image = workshop
        .call(&Tool::Layer { mount_points }, None, take)
        .await;
    if paused {
        workshop.resume().await?;
    }
    workshop.close().await?;
    let image = image?;
    let reference = [
        ("comment", args.message.clone()),
        ("imageID", image.id.to_string()),
    ];
    root.tell(&container.meta, "commit", reference);
    output::write(&format!("{}\n", image.id))
}

/// What the container was run with becomes what the image runs with.
fn as_run(config: &mut Value, meta: &Meta, spec: &Value) {
    if config.is_null() {
        *config = json!({});
    }
    let entrypoint: Vec<String> =
        serde_json::from_value(config["Entrypoint"].clone()).unwrap_or_default();
    let command = match meta.command.strip_prefix(entrypoint.as_slice()) {
        Some(rest) => rest.to_vec(),
        None => {
            config["Entrypoint"] = Value::Null;
            meta.command.clone()
        }
    };
    config["Cmd"] = json!(command);
    let process = &spec["process"];
    let variables = process["env"].as_array().into_iter().flatten();
    let variables = variables.filter_map(Value::as_str);
    let kept: Vec<&str> = variables
        .filter(|v| !ADDED.iter().any(|added| v.starts_with(added)))
        .collect();
    config["Env"] = json!(kept);
    config["WorkingDir"] = process["cwd"].clone();
    let user = &spec["annotations"][crate::plan::USER_ANNOTATION];
    config["User"] = json!(user.as_str().unwrap_or_default());
    config["Labels"] = json!(meta.labels);
    if let Some(signal) = &meta.stop_signal {
        config["StopSignal"] = json!(signal);
    }
}

/// One instruction, as in a Dockerfile.
fn apply(config: &mut Value, instruction: &str) -> anyhow::Result<()> {
    let instruction = instruction.trim();
    let (word, rest) = instruction
        .split_once(char::is_whitespace)
        .unwrap_or((instruction, ""));
    let rest = rest.trim();
    if rest.is_empty() {
        bail!("{word} of what?");
    }
    match word.to_ascii_uppercase().as_str() {
        "CMD" => config["Cmd"] = json!(command(rest)),
        "ENTRYPOINT" => {
            config["Entrypoint"] = json!(command(rest));
            // As in a Dockerfile: the command was meant for another one.
            config["Cmd"] = Value::Null;
        }
        "ENV" => {
            let (name, value) = pair(rest)?;
            let mut all: Vec<String> =
                serde_json::from_value(config["Env"].clone()).unwrap_or_default();
            super::env::set(&mut all, format!("{name}={value}"));
            config["Env"] = json!(all);
        }
        "LABEL" => {
            let (name, value) = pair(rest)?;
            member(config, "Labels", name, json!(value));
        }
        "EXPOSE" => {
            for port in rest.split_whitespace() {
                member(config, "ExposedPorts", &exposed(port)?, json!({}));
            }
        }
        "VOLUME" => {
            let paths = match rest.starts_with('[') {
                true => serde_json::from_str(rest).context("this is no list")?,
                false => rest
                    .split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>(),
            };
            for path in paths {
                member(config, "Volumes", &path, json!({}));
            }
        }
        "STOPSIGNAL" => {
            super::signals::parse(rest)?;
            config["StopSignal"] = json!(rest);
        }
        "USER" => config["User"] = json!(rest),
        "WORKDIR" => config["WorkingDir"] = json!(rest),
        _ => bail!(
            "{word} is none of CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME and WORKDIR"
        ),
    }
    Ok(())
}

fn member(config: &mut Value, of: &str, name: &str, value: Value) {
    if !config[of].is_object() {
        config[of] = json!({});
    }
    config[of][name] = value;
}

/// `["a", "b"]`, or a line for the shell.
fn command(text: &str) -> Vec<String> {
    match serde_json::from_str(text) {
        Ok(words) => words,
        Err(_) => ["/bin/sh", "-c", text].map(str::to_owned).to_vec(),
    }
}

/// `name=value`, or `name value`; quotes around the value are the shell's.
fn pair(text: &str) -> anyhow::Result<(&str, &str)> {
    let (name, value) = text
        .split_once('=')
        .or_else(|| text.split_once(char::is_whitespace))
        .with_context(|| format!("{text:?} has no value"))?;
    let value = value.trim();
    let bare = ['"', '\'']
        .iter()
        .find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
    match name.trim() {
        "" => bail!("{text:?} has no name"),
        name => Ok((name, bare.unwrap_or(value))),
    }
}

/// A port, as an image's configuration has it: with its protocol.
fn exposed(port: &str) -> anyhow::Result<String> {
    let (number, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
    let known = ["tcp", "udp", "sctp"].contains(&protocol);
    match number.parse::<u16>() {
        Ok(1..) if known => Ok(format!("{number}/{protocol}")),
        _ => bail!("{port:?} is no port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apply_of_each_instruction_changes_the_configuration() {
        let mut config = json!({"Cmd": ["old"], "Env": ["A=0"]});
        for change in [
            "ENV A=1",
            "env B two words",
            r#"LABEL who="me and you""#,
            "EXPOSE 80 53/udp",
            "VOLUME /a /b",
            "USER www-data",
            "WORKDIR /srv",
            "STOPSIGNAL SIGQUIT",
            r#"ENTRYPOINT ["/entry"]"#,
            "CMD serve it",
        ] {
            apply(&mut config, change).unwrap();
        }
        assert_eq!(
            config,
            json!({
                "Cmd": ["/bin/sh", "-c", "serve it"], "Entrypoint": ["/entry"],
                "Env": ["A=1", "B=two words"], "Labels": {"who": "me and you"},
                "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "Volumes": {"/a": {}, "/b": {}},
                "User": "www-data", "WorkingDir": "/srv", "StopSignal": "SIGQUIT",
            })
        );
    }

    #[test]
    fn apply_of_nonsense_says_what_is_wrong() {
        for (change, part) in [
            ("FROM debian", "FROM"),
            ("CMD", "of what"),
            ("EXPOSE many", "many"),
            ("ENV A", "no value"),
            ("STOPSIGNAL SIGNOT", "SIGNOT"),
            ("VOLUME [1", "list"),
        ] {
            let error = format!("{:#}", apply(&mut json!({}), change).unwrap_err());
            assert!(error.contains(part), "{change}: {error}");
        }
    }

    #[test]
    fn as_run_keeps_the_entrypoint_only_if_it_was_used() {
        let meta = |command: &[&str]| Meta {
            command: command.iter().map(|&c| c.to_owned()).collect(),
            ..Meta::default()
        };
        let spec = json!({"process": {"env": ["PATH=/bin", "HOSTNAME=x", "A=1"], "cwd": "/srv"}});
        let mut config = json!({"Entrypoint": ["/entry"], "Cmd": ["old"]});
        as_run(&mut config, &meta(&["/entry", "new"]), &spec);
        assert_eq!(
            (&config["Entrypoint"], &config["Cmd"]),
            (&json!(["/entry"]), &json!(["new"]))
        );
        assert_eq!(config["Env"], json!(["PATH=/bin", "A=1"]));
        as_run(&mut config, &meta(&["sh"]), &spec);
        assert_eq!(
            (&config["Entrypoint"], &config["Cmd"]),
            (&Value::Null, &json!(["sh"]))
        );
    }
}
