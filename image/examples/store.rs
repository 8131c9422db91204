//! The store from a command line, for trying it out and for measurements:
//! `store DATA pull NAME | load PATH | save FORMAT PATH NAME… | list | rootfs NAME | remove NAME | prune`.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use casemate_image::{
    Event, LoadOptions, LoadSource, Progress, PullOptions, PullPolicy, SaveTarget, Store,
    parse_reference,
};

struct Lines;

impl Progress for Lines {
    fn event(&self, event: Event<'_>) {
        if !matches!(event, Event::LayerBytes { .. }) {
            eprintln!("{event:?}");
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let start = Instant::now();
    let store = Store::open(arguments.first().ok_or("which data directory?")?)?;
    match arguments[1..] {
        ["pull", name] => {
            let options = PullOptions {
                policy: PullPolicy::Always,
                progress: Arc::new(Lines),
                ..PullOptions::default()
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            let image = runtime.block_on(store.pull(&parse_reference(name)?, &options))?;
            println!("{}", image.id);
        }
        ["load", path] => {
            let options = LoadOptions {
                progress: Arc::new(Lines),
                ..LoadOptions::default()
            };
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            for image in
                runtime.block_on(store.load(LoadSource::Path(Path::new(path)), &options))?
            {
                println!("{} {:?}", image.id, image.names);
            }
        }
        ["save", format, path, ref names @ ..] => match format {
            "oci-layout" => store.save(names, SaveTarget::OciLayout(Path::new(path)))?,
            "oci-archive" => store.save(names, SaveTarget::OciArchive(&mut File::create(path)?))?,
            _ => store.save(names, SaveTarget::DockerArchive(&mut File::create(path)?))?,
        },
        ["list"] => {
            for image in store.list()? {
                println!("{} {:?} {}", image.id.short(), image.names, image.size);
            }
        }
        ["rootfs", name] => {
            let image = store.find(name)?.ok_or("no such image")?;
            let disk = store.rootfs(&image)?;
            for path in std::iter::once(&disk.metadata).chain(&disk.layers) {
                println!("{}", path.display());
            }
        }
        ["remove", name] => println!("{:?}", store.remove(name, false)?),
        ["prune"] => println!("{:?}", store.prune(true)?),
        _ => return Err("pull NAME | list | rootfs NAME | remove NAME | prune".into()),
    }
    eprintln!("{:.3} s", start.elapsed().as_secs_f64());
    Ok(())
}
