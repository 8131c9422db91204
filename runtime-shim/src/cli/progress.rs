//! How a pull or a load is going: bars on a terminal, plain lines elsewhere.

use crate::size::Human;
use casemate_image::{Event, NoProgress, Progress};
use casemate_protocol::text::printable;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Mutex};

/// The way of showing that fits standard error.
pub(super) fn choose(quiet: bool) -> Arc<dyn Progress> {
    if quiet {
        Arc::new(NoProgress)
    } else if std::io::stderr().is_terminal() {
        Arc::new(Bars::default())
    } else {
        Arc::new(Lines)
    }
}

/// The beginning of a digest, as Docker shows a layer.
fn short(digest: &dyn std::fmt::Display) -> String {
    let text = digest.to_string();
    let hex = text.split(':').next_back().unwrap_or_default();
    hex.chars().take(12).collect()
}

/// The reason may be a registry's words.
fn retrying(what: &str, reason: &str, delay_ms: u64) -> String {
    format!("{what}: {}; again in {delay_ms} ms", printable(reason))
}

struct Lines;

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        let line = match event {
            Event::Resolving { reference } => format!("{}: resolving", printable(reference)),
            Event::Resolved { layers, bytes, .. } => {
                format!("{layers} layers, {} to fetch at most", Human(bytes))
            }
            Event::LayerCached { layer, .. } => format!("{}: already here", short(layer)),
            Event::LayerWaiting { layer, .. } => {
                format!("{}: waiting for another pull", short(layer))
            }
            Event::LayerDone {
                layer, blob_bytes, ..
            } => format!("{}: done, {}", short(layer), Human(blob_bytes)),
            Event::Retrying {
                what,
                reason,
                delay_ms,
            } => retrying(what, reason, delay_ms),
            _ => return,
        };
        // Progress is a courtesy: a closed standard error must not stop a pull.
        let _ = writeln!(std::io::stderr(), "{line}");
    }
}

#[derive(Default)]
struct Bars {
    all: MultiProgress,
    /// By layer index.
    bars: Mutex<HashMap<usize, ProgressBar>>,
}

impl Bars {
    fn bar(&self, index: usize, layer: &dyn std::fmt::Display) -> ProgressBar {
        let mut bars = self.bars.lock().unwrap_or_else(|e| e.into_inner());
        let make = || {
            let bar = self.all.add(ProgressBar::new(0));
            bar.set_prefix(short(layer));
            bar
        };
        bars.entry(index).or_insert_with(make).clone()
    }

    fn say(&self, index: usize, layer: &dyn std::fmt::Display, text: String) {
        let bar = self.bar(index, layer);
        bar.set_style(style("{prefix}: {msg}"));
        bar.set_message(text);
    }
}

fn style(template: &str) -> ProgressStyle {
    // A template that doesn't parse would be our own mistake; the default bar still tells enough.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Bars {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::LayerCached { index, layer } => self.say(index, layer, "already here".into()),
            Event::LayerWaiting { index, layer } => {
                self.say(index, layer, "waiting for another pull".into());
            }
            Event::LayerStarted {
                index,
                layer,
                bytes,
            } => {
                let bar = self.bar(index, layer);
                bar.set_length(bytes);
                bar.set_position(0);
                bar.set_style(style(
                    "{prefix}: [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
                ));
            }
            Event::LayerBytes {
                index,
                layer,
                received,
            } => self.bar(index, layer).set_position(received),
            Event::LayerDone {
                index,
                layer,
                blob_bytes,
            } => {
                self.say(index, layer, format!("done, {}", Human(blob_bytes)));
                self.bar(index, layer).finish();
            }
            Event::Retrying {
                what,
                reason,
                delay_ms,
            } => {
                let _ = self.all.println(retrying(what, reason, delay_ms));
            }
            _ => {}
        }
    }
}
