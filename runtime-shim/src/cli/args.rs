//! The command line's grammar. Names and meanings are Docker's where Docker has them.

use super::commit::CommitArgs;
use super::cp::CpArgs;
use super::diff::DiffArgs;
use super::events::EventsArgs;
use super::health::HealthArgs;
use super::limits::ResourceArgs;
use super::network_args::{NetworkArgs, NetworkCommand};
use super::security::SecurityArgs;
use super::system::SystemCommand;
use super::top::TopArgs;
use super::update::UpdateArgs;
use crate::restart::Policy;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

/// Containers in microVMs of their own
#[derive(Debug, Parser)]
#[command(
    name = "casemate",
    version,
    max_term_width = 100,
    disable_help_subcommand = true
)]
pub(super) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a command in a new container
    Run(Box<RunArgs>),
    /// Make a container without starting it
    Create(Box<CreateArgs>),
    /// Start containers that were made or have ended
    Start(StartArgs),
    /// Stop containers and start them again
    Restart(StopArgs),
    /// Show what a container wrote
    Logs(LogsArgs),
    /// Take part in a running container: see its output, give it input
    Attach(AttachArgs),
    /// Copy files into a container or out of it
    Cp(CpArgs),
    /// Show what a container changed of its image
    Diff(DiffArgs),
    /// Make an image of what a container changed
    Commit(CommitArgs),
    /// Show the processes of a container
    Top(TopArgs),
    /// Show what running containers use
    Stats(StatsArgs),
    /// Show what happens to containers and images, as it happens
    Events(EventsArgs),
    /// Change the limits of containers
    Update(UpdateArgs),
    /// Give a container another name
    Rename(RenameArgs),
    /// Fetch an image from a registry
    Pull(PullArgs),
    /// List images
    Images(ImagesArgs),
    /// Remove images
    Rmi(RmiArgs),
    /// Load images from an archive or an OCI layout
    Load(LoadArgs),
    /// Save images to an archive
    Save(SaveArgs),
    /// Give an image a further name
    Tag(TagArgs),
    /// Show everything about containers or images, as JSON
    Inspect(InspectArgs),
    /// Remove images without a name, and what no image needs
    Prune(PruneArgs),
    /// List containers
    Ps(PsArgs),
    /// Remove containers
    Rm(RmArgs),
    /// Make, list and remove volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Run a command in a running container
    Exec(Box<ExecArgs>),
    /// Ask containers to end, and kill those that don't
    Stop(StopArgs),
    /// Send a signal to containers
    Kill(KillArgs),
    /// Wait until containers end, and print their exit codes
    Wait(ContainersArgs),
    /// Freeze containers
    Pause(ContainersArgs),
    /// Let frozen containers go on
    Unpause(ContainersArgs),
    /// Say whether this host can run microVMs, and what is missing
    Check(CheckArgs),
    /// Look at the whole of it, and remove what nothing needs
    #[command(subcommand)]
    System(SystemCommand),
    /// Show the host, the installation and what is there
    Info(FormatArgs),
    /// Show what ports of a container the host has
    Port(PortArgs),
    /// Manage networks
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Show the version
    Version(FormatArgs),
    /// Print a shell's completion script
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages
    #[command(hide = true)]
    Man {
        /// Where to
        dir: PathBuf,
    },
}

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PullWhen {
    /// Even if the image is here
    Always,
    /// If it is not here
    Missing,
    /// Use what is here
    Never,
}

/// How `--timing` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum TimingFormat {
    /// For people
    Table,
    /// For programs
    Json,
    /// For people, with the guest kernel's initcalls
    Initcalls,
}

/// What a process gets, the container's first or a later one.
#[derive(Debug, Default, Args)]
pub(super) struct ProcessArgs {
    /// Keep standard input open
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Set an environment variable: NAME=VALUE, or NAME for its value here
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub(super) env: Vec<String>,
    /// Read environment variables from a file
    #[arg(long, value_name = "FILE")]
    pub(super) env_file: Vec<PathBuf>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub(super) workdir: Option<String>,
    /// User, and group, to run as: NAME|UID[:GROUP|GID]
    #[arg(short, long)]
    pub(super) user: Option<String>,
}

/// `casemate run`
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Leave the container to itself and print its id
    #[arg(short, long, conflicts_with_all = ["kernel_log"])]
    pub(super) detach: bool,
    /// Print on standard error how long each phase of the start took
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub(super) timing: Option<TimingFormat>,
    /// Write the guest kernel's log to standard error, or to a file
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    pub(super) kernel_log: Option<PathBuf>,
    /// The container.
    #[command(flatten)]
    pub(super) container: CreateArgs,
}

/// `casemate create`
#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Remove the container when it ends
    #[arg(long)]
    pub(super) rm: bool,
    /// What the process gets.
    #[command(flatten)]
    pub(super) process: ProcessArgs,
    /// Replace the image's entrypoint
    #[arg(long, value_name = "COMMAND")]
    pub(super) entrypoint: Option<String>,
    /// The container's host name
    #[arg(long, value_name = "NAME")]
    pub(super) hostname: Option<String>,
    /// The container's name
    #[arg(long)]
    pub(super) name: Option<String>,
    /// What it may take.
    #[command(flatten)]
    pub(super) resources: ResourceArgs,
    /// What power it has.
    #[command(flatten)]
    pub(super) security: SecurityArgs,
    /// Make the container's root file system read-only
    #[arg(long)]
    pub(super) read_only: bool,
    /// Mount a tmpfs: DIR[:OPTIONS]
    #[arg(long, value_name = "DIR[:OPTIONS]")]
    pub(super) tmpfs: Vec<String>,
    /// Mount a volume, or a file or directory of the host: [VOLUME|PATH:]DIR[:OPTIONS]
    #[arg(short, long = "volume", value_name = "[SOURCE:]DIR[:OPTIONS]")]
    pub(super) volumes: Vec<String>,
    /// Mount a volume, a file or directory of the host, or a tmpfs: type=volume,source=NAME,target=DIR,…
    #[arg(long = "mount", value_name = "KEY=VALUE,…")]
    pub(super) mounts: Vec<String>,
    /// Mount what another container has mounted: CONTAINER[:ro]
    #[arg(long, value_name = "CONTAINER[:ro]")]
    pub(super) volumes_from: Vec<String>,
    /// Set a label: NAME[=VALUE]
    #[arg(short, long = "label", value_name = "NAME[=VALUE]")]
    pub(super) labels: Vec<String>,
    /// When to ask the registry for the image
    #[arg(long, value_enum, default_value = "missing", value_name = "WHEN")]
    pub(super) pull: PullWhen,
    /// Platform of the image: OS/ARCH[/VARIANT]
    #[arg(long)]
    pub(super) platform: Option<String>,
    /// Start it again when it ends: no, on-failure[:TIMES], always or unless-stopped
    #[arg(
        long,
        default_value = "no",
        value_name = "POLICY",
        conflicts_with = "rm"
    )]
    pub(super) restart: Policy,
    /// The signal that `stop` sends
    #[arg(long, value_name = "SIGNAL")]
    pub(super) stop_signal: Option<String>,
    /// Seconds that `stop` waits before it kills
    #[arg(long, value_name = "SECONDS")]
    pub(super) stop_timeout: Option<u32>,
    /// Where its output is logged: json-file and local both mean casemate's own log, none means nowhere
    #[arg(long, value_enum, value_name = "DRIVER")]
    pub(super) log_driver: Option<LogDriver>,
    /// Bounds of the log: max-size=SIZE, max-file=NUMBER
    #[arg(long, value_name = "NAME=VALUE")]
    pub(super) log_opt: Vec<String>,
    /// Write the container's id to a file
    #[arg(long, value_name = "FILE")]
    pub(super) cidfile: Option<PathBuf>,
    /// What tells whether it is well.
    #[command(flatten)]
    pub(super) health: HealthArgs,
    /// Its network.
    #[command(flatten)]
    pub(super) network: NetworkArgs,
    /// The image, and the command with its arguments: options are what stands before
    #[arg(
        required = true,
        trailing_var_arg = true,
        value_name = "IMAGE [COMMAND…]"
    )]
    image_and_command: Vec<String>,
}

impl CreateArgs {
    /// The image.
    pub(super) fn image(&self) -> &str {
        self.image_and_command.first().map_or("", String::as_str)
    }

    /// The command and its arguments; empty: the image's.
    pub(super) fn command(&self) -> &[String] {
        self.image_and_command.get(1..).unwrap_or_default()
    }
}

/// `--log-driver`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogDriver {
    /// Our own
    JsonFile,
    /// Our own
    Local,
    /// Nowhere
    None,
}

/// `casemate start`
#[derive(Debug, Args)]
pub(super) struct StartArgs {
    /// Show the container's output and wait for its end
    #[arg(short, long)]
    pub(super) attach: bool,
    /// Give it our standard input
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Names or ids
    #[arg(required = true)]
    pub(super) containers: Vec<String>,
}

/// `casemate logs`
#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// Go on as the container writes, until it ends
    #[arg(short, long)]
    pub(super) follow: bool,
    /// Only what was written since: a time like 2026-01-31T12:00:00Z, or an age like 10m
    #[arg(long, value_name = "TIME")]
    pub(super) since: Option<String>,
    /// Only what was written until then
    #[arg(long, value_name = "TIME")]
    pub(super) until: Option<String>,
    /// Only so many lines from the end, or all
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all")]
    pub(super) tail: String,
    /// Show when each line was written
    #[arg(short, long)]
    pub(super) timestamps: bool,
    /// Name or id
    pub(super) container: String,
}

/// `casemate attach`
#[derive(Debug, Args)]
pub(super) struct AttachArgs {
    /// Don't give it our standard input
    #[arg(long)]
    pub(super) no_stdin: bool,
    /// The keys that leave it to itself again
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub(super) detach_keys: String,
    /// Name or id
    pub(super) container: String,
}

/// `casemate stats`
#[derive(Debug, Default, Args)]
pub(super) struct StatsArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Show those that don't run too
    #[arg(short, long)]
    pub(super) all: bool,
    /// Show the figures once
    #[arg(long)]
    pub(super) no_stream: bool,
    /// Don't shorten ids
    #[arg(long)]
    pub(super) no_trunc: bool,
    /// Names or ids; without any: all that run
    pub(super) containers: Vec<String>,
}

/// `casemate rename`
#[derive(Debug, Args)]
pub(super) struct RenameArgs {
    /// Name or id
    pub(super) container: String,
    /// The new name
    pub(super) name: String,
}

/// `casemate pull`
#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// Platform of the image: OS/ARCH[/VARIANT]
    #[arg(long)]
    pub(super) platform: Option<String>,
    /// Print the image's id only
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// The image
    pub(super) image: String,
}

/// `--format`
#[derive(Debug, Default, Args)]
pub(super) struct FormatArgs {
    /// table, json or a Go template such as '{{.ID}}'
    #[arg(long)]
    pub(super) format: Option<String>,
}

/// `casemate images`
#[derive(Debug, Args)]
pub(super) struct ImagesArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Print ids only
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Don't shorten ids
    #[arg(long)]
    pub(super) no_trunc: bool,
    /// Show digests
    #[arg(long)]
    pub(super) digests: bool,
    /// Only images of this repository or name
    pub(super) name: Option<String>,
}

/// `casemate rmi`
#[derive(Debug, Args)]
pub(super) struct RmiArgs {
    /// Remove an image that has several names or is in use
    #[arg(short, long)]
    pub(super) force: bool,
    /// Names or ids
    #[arg(required = true)]
    pub(super) images: Vec<String>,
}

/// `casemate load`
#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// Read from this archive or OCI layout directory instead of standard input
    #[arg(short, long, value_name = "PATH")]
    pub(super) input: Option<PathBuf>,
    /// Platform of the images: OS/ARCH[/VARIANT]
    #[arg(long)]
    pub(super) platform: Option<String>,
    /// Print the images' names only
    #[arg(short, long)]
    pub(super) quiet: bool,
}

/// Formats of `casemate save`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SaveFormat {
    /// What `docker load` reads
    DockerArchive,
    /// An OCI layout in a tar file
    OciArchive,
    /// An OCI layout directory
    OciDir,
}

/// `casemate save`
#[derive(Debug, Args)]
pub(super) struct SaveArgs {
    /// Write to this file or directory instead of standard output
    #[arg(short, long, value_name = "PATH")]
    pub(super) output: Option<PathBuf>,
    /// What to write
    #[arg(long, value_enum, default_value = "docker-archive")]
    pub(super) format: SaveFormat,
    /// Names or ids
    #[arg(required = true)]
    pub(super) images: Vec<String>,
}

/// `casemate tag`
#[derive(Debug, Args)]
pub(super) struct TagArgs {
    /// Name or id
    pub(super) source: String,
    /// The new name
    pub(super) target: String,
}

/// What `inspect` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kind {
    /// Containers
    Container,
    /// Images
    Image,
}

/// `casemate inspect`
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Look for this kind only
    #[arg(long = "type", value_enum)]
    pub(super) kind: Option<Kind>,
    /// Names or ids
    #[arg(required = true)]
    pub(super) names: Vec<String>,
}

/// `casemate prune`
#[derive(Debug, Args)]
pub(super) struct PruneArgs {
    /// Remove every image that no container uses
    #[arg(short, long)]
    pub(super) all: bool,
    /// Don't ask
    #[arg(short, long)]
    pub(super) force: bool,
}

/// `casemate ps`
#[derive(Debug, Args)]
pub(super) struct PsArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Show those that ended too
    #[arg(short, long)]
    pub(super) all: bool,
    /// Print ids only
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Don't shorten ids and commands
    #[arg(long)]
    pub(super) no_trunc: bool,
    /// Only those with: id, name, label, status, ancestor, exited, health, before or since
    #[arg(short, long, value_name = "KEY=VALUE")]
    pub(super) filter: Vec<String>,
    /// Only the last so many, whatever they do
    #[arg(short = 'n', long, value_name = "NUMBER")]
    pub(super) last: Option<usize>,
    /// Only the last one, whatever it does
    #[arg(short, long, conflicts_with = "last")]
    pub(super) latest: bool,
}

/// `casemate rm`
#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Remove running containers too
    #[arg(short, long)]
    pub(super) force: bool,
    /// Remove the volumes too that were made for them and have no name
    #[arg(short, long)]
    pub(super) volumes: bool,
    /// Names or ids
    #[arg(required = true)]
    pub(super) containers: Vec<String>,
}

/// `casemate volume`
#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Make a volume
    Create(VolumeCreateArgs),
    /// List volumes
    #[command(alias = "list")]
    Ls(VolumeLsArgs),
    /// Show everything about volumes, as JSON
    Inspect(VolumeInspectArgs),
    /// Remove volumes that no container uses
    #[command(alias = "remove")]
    Rm(VolumeRmArgs),
    /// Remove all volumes without a name that no container uses
    Prune(VolumePruneArgs),
}

/// `casemate volume create`
#[derive(Debug, Args)]
pub(super) struct VolumeCreateArgs {
    /// Size of its disk, a hard limit; what is not written takes no room on the host
    #[arg(long, value_name = "SIZE", conflicts_with = "from")]
    pub(super) size: Option<String>,
    /// An option: size=SIZE
    #[arg(short, long, value_name = "NAME=VALUE", conflicts_with_all = ["from", "size"])]
    pub(super) opt: Vec<String>,
    /// Set a label: NAME[=VALUE]
    #[arg(long = "label", value_name = "NAME[=VALUE]")]
    pub(super) labels: Vec<String>,
    /// Begin with the content of another volume, which nobody may be writing to
    #[arg(long, value_name = "VOLUME")]
    pub(super) from: Option<String>,
    /// The driver, of which there is one: local
    #[arg(short, long, value_name = "DRIVER", default_value = "local", value_parser = ["local"])]
    pub(super) driver: String,
    /// The name; without one it gets one
    pub(super) name: Option<String>,
}

/// `casemate volume ls`
#[derive(Debug, Args)]
pub(super) struct VolumeLsArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Print names only
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Only those with this: name=TEXT, label=NAME[=VALUE], dangling=true|false or driver=local
    #[arg(short, long = "filter", value_name = "NAME=VALUE")]
    pub(super) filters: Vec<String>,
}

/// `casemate volume inspect`
#[derive(Debug, Args)]
pub(super) struct VolumeInspectArgs {
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
    /// Names
    #[arg(required = true)]
    pub(super) volumes: Vec<String>,
}

/// `casemate volume rm`
#[derive(Debug, Args)]
pub(super) struct VolumeRmArgs {
    /// Don't complain of volumes that aren't there
    #[arg(short, long)]
    pub(super) force: bool,
    /// Names
    #[arg(required = true)]
    pub(super) volumes: Vec<String>,
}

/// `casemate volume prune`
#[derive(Debug, Args)]
pub(super) struct VolumePruneArgs {
    /// Also those that have a name
    #[arg(short, long)]
    pub(super) all: bool,
    /// Don't ask
    #[arg(short, long)]
    pub(super) force: bool,
    /// Only those with this: label=NAME[=VALUE]
    #[arg(long = "filter", value_name = "NAME=VALUE")]
    pub(super) filters: Vec<String>,
}

/// `casemate exec`
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// What the process gets.
    #[command(flatten)]
    pub(super) process: ProcessArgs,
    /// Give the process all capabilities
    #[arg(long)]
    pub(super) privileged: bool,
    /// Leave the process to itself
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub(super) detach: bool,
    /// Name or id
    pub(super) container: String,
    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    pub(super) command: Vec<String>,
}

/// `casemate stop`
#[derive(Debug, Args)]
pub(super) struct StopArgs {
    /// Seconds until a container that goes on is killed: 10, or what it was made with
    #[arg(short = 't', long = "timeout", alias = "time", value_name = "SECONDS")]
    pub(super) timeout: Option<u32>,
    /// Names or ids
    #[arg(required = true)]
    pub(super) containers: Vec<String>,
}

/// `casemate kill`
#[derive(Debug, Args)]
pub(super) struct KillArgs {
    /// The signal: KILL, SIGTERM, 15, …
    #[arg(short, long, default_value = "KILL")]
    pub(super) signal: String,
    /// Names or ids
    #[arg(required = true)]
    pub(super) containers: Vec<String>,
}

/// Commands that take nothing but containers.
#[derive(Debug, Args)]
pub(super) struct ContainersArgs {
    /// Names or ids
    #[arg(required = true)]
    pub(super) containers: Vec<String>,
}

/// `casemate port`
#[derive(Debug, Args)]
pub(super) struct PortArgs {
    /// Name or id
    pub(super) container: String,
    /// Only this port of the container: PORT[/tcp|udp]
    pub(super) port: Option<String>,
}

/// `casemate check`
#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Say nothing; the exit code tells
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// How to print.
    #[command(flatten)]
    pub(super) format: FormatArgs,
}

#[cfg(test)]
impl CreateArgs {
    /// The arguments of a `casemate create` with these words.
    pub(super) fn of(line: &str) -> Self {
        let words = ["casemate", "create"]
            .into_iter()
            .chain(line.split_whitespace());
        match Cli::parse_from(words).command {
            Command::Create(create) => *create,
            _ => panic!("not create"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn grammar_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn run_passes_everything_after_the_image_to_the_command() {
        let cli = Cli::parse_from([
            "casemate", "run", "--rm", "-it", "-e", "A=b", "--timing", "busybox", "-m", "-c",
            "--rm -x",
        ]);
        let Command::Run(run) = cli.command else {
            panic!("not run")
        };
        assert_eq!(run.timing, Some(TimingFormat::Table));
        let container = run.container;
        assert!(container.rm && container.process.interactive && container.process.tty);
        assert_eq!(container.image(), "busybox");
        assert_eq!(container.command(), ["-m", "-c", "--rm -x"]);
        let unknown = Cli::try_parse_from(["casemate", "run", "--bogus", "busybox"]);
        assert!(unknown.unwrap_err().to_string().contains("--bogus"));
    }
}
