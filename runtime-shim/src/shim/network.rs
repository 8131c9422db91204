//! The sandbox's network: its devices for the VMM, and for the agent what they are to be.
//!
//! CNI plugins take their time, as the guest's boot does: they run beside it. So the devices come first, and what the
//! plugins put into the namespace is joined with them afterwards.

use super::bounds::Bounds;
use super::gate::{Gate, Keeper};
use super::launch::Launch;
use super::names::{self, Names};
use super::passt::{self, Passt};
use super::ports::{self, PortError};
use crate::journal::{Journal, Taken};
use crate::network::cni::{self, Attachment, CniError, Outcome};
use crate::network::egress::{self, Policy};
use crate::network::look::{Interface, Seen};
use crate::network::networks::{self, Network, NetworkError};
use crate::network::wish::{self, Mac, Wish};
use crate::network::{self, NETNS, netns, tap, user};
use crate::plan::{self, Limits};
use casemate_protocol::netlink::Socket;
use casemate_protocol::{NAMES_PORT, agent as proto};
use casemate_vmm::config::NetConfig;
use oci_spec::runtime::{Mount, Spec};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use tokio::sync::oneshot;

/// The MTU of an interface fits into a device's configuration.
const MAX_MTU: u32 = 65_535;

/// Held while plugins run: nothing is given back that is still being taken.
static BUSY: Mutex<()> = Mutex::new(());

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub(super) enum NetworkFailure {
    /// What it shall be can't be read.
    #[error("can't read what networks the container is on, in {path}")]
    Wish {
        /// The sandbox's directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The network isn't there.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A plugin failed.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// Something of the namespace.
    #[error("can't {action} (network namespace {netns})")]
    Netns {
        /// What was tried.
        action: &'static str,
        /// The namespace.
        netns: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A port of the host is somebody else's.
    #[error(transparent)]
    Port(#[from] PortError),
    /// An internal network may have a way out.
    #[error("can't keep the host from routing for internal networks")]
    Seal(#[source] io::Error),
    /// The resolver.
    #[error("can't start the container's resolver")]
    Resolver(#[source] io::Error),
    /// The journal can't be written.
    #[error("can't write the sandbox's journal")]
    Journal(#[source] io::Error),
    /// The plugins made no interface.
    #[error("network {network} made no interface {interface} with a MAC address")]
    NoInterface {
        /// The network.
        network: String,
        /// The missing interface.
        interface: String,
    },
    /// An ordinary user's network.
    #[error("network passt: {message}")]
    User {
        /// What happened.
        message: String,
        /// The cause.
        source: Option<io::Error>,
    },
    /// The thread that ran the plugins is gone.
    #[error("the network's thread ended")]
    Thread,
}

/// A device for the VMM.
struct Device {
    tap: OwnedFd,
    mac: [u8; 6],
    mtu: u16,
}

/// What the guest is told.
#[derive(Default)]
pub(super) struct Told {
    /// For the agent.
    pub(super) request: proto::NetworkRequest,
    /// The container's addresses on its networks.
    pub(super) ips: Vec<IpAddr>,
    /// What goes with the container's end.
    pub(super) kept: Kept,
}

/// What a network has of the host for as long as the container runs.
#[derive(Default)]
pub(super) struct Kept {
    /// Sockets that keep the host's ports from everybody else.
    _ports: Vec<OwnedFd>,
    /// An ordinary user's network.
    pub(super) passt: Option<Passt>,
}

/// The networks of a sandbox, while they are being made.
pub(super) struct Attaching {
    devices: Vec<Device>,
    kept: Kept,
    /// The guest's end of the stream to the resolver.
    names: Option<OwnedFd>,
    told: oneshot::Receiver<Result<Told, NetworkFailure>>,
}

/// What an interface of the sandbox's own namespace needs.
struct Own {
    attachment: Attachment,
    mac: [u8; 6],
    /// Its device's MTU.
    mtu: u16,
}

fn tap_name(number: usize) -> String {
    format!("tap{number}")
}

impl Attaching {
    /// Begins with it: afterwards the devices are there. A namespace in the sandbox's directory is ours to make and to
    /// fill; any other one was filled by whoever made it.
    pub(super) fn begin(
        id: &str,
        bundle: &Path,
        netns: &Path,
        bounds: &Bounds,
        launch: &Launch<'_>,
    ) -> Result<Self, NetworkFailure> {
        if netns == bundle.join(NETNS) {
            Self::own(id, bundle, netns, bounds, launch)
        } else {
            Self::given(netns)
        }
    }

    fn own(
        id: &str,
        bundle: &Path,
        netns: &Path,
        bounds: &Bounds,
        launch: &Launch<'_>,
    ) -> Result<Self, NetworkFailure> {
        let failed = |action| {
            move |source| NetworkFailure::Netns {
                action,
                netns: netns.to_owned(),
                source,
            }
        };
        let read = Wish::read(bundle).map_err(|source| NetworkFailure::Wish {
            path: bundle.to_owned(),
            source,
        });
        let wish = read?.unwrap_or_default();
        if wish.attachments.iter().any(|a| a.network == user::NAME) {
            return Self::of_user(bundle, &wish, bounds, launch);
        }
        let own = planned(id, &wish, netns, launch)?;
        let ports = wish
            .ports
            .iter()
            .map(ports::keep)
            .collect::<Result<_, _>>()?;
        let kept = Kept {
            _ports: ports,
            passt: None,
        };
        let names = resolver(&wish, launch, Keeper::Us(netns.to_owned()))?;
        let journal = launch.journal.clone();
        let taken = Taken::Netns {
            path: netns.to_owned(),
        };
        journal.record(&taken).map_err(NetworkFailure::Journal)?;
        netns::create(netns).map_err(failed("make a network namespace"))?;
        let open = || (0..own.len()).map(|n| tap::open(&tap_name(n))).collect();
        let taps: Vec<OwnedFd> = netns::enter(netns, open).map_err(failed("make a tap"))?;
        let devices = taps.into_iter().zip(&own);
        let devices = devices.map(|(tap, own)| Device {
            tap,
            mac: own.mac,
            mtu: own.mtu,
        });
        let devices = devices.collect();

        let (tell, told) = oneshot::channel();
        let (bundle, netns, policy) = (bundle.to_owned(), netns.to_owned(), wish.egress);
        let networks = networks::dir_of(&launch.settings.data_dir);
        std::thread::spawn(move || {
            let _busy = BUSY.lock().unwrap_or_else(|e| e.into_inner());
            // Nobody listens if the guest failed in the meantime.
            if !tell.is_closed() {
                let filled = fill(&bundle, &netns, &own, policy.as_ref(), &journal);
                let sealed = filled.and_then(|told| seal(&networks).map(|()| told));
                let _ = tell.send(sealed);
            }
        });
        Ok(Self {
            devices,
            kept,
            names: Some(names),
            told,
        })
    }

    /// By way of passt.
    fn of_user(
        bundle: &Path,
        wish: &Wish,
        bounds: &Bounds,
        launch: &Launch<'_>,
    ) -> Result<Self, NetworkFailure> {
        let mac = wish.attachments.first().map_or(Mac([2; 6]), |a| a.mac);
        let six = user::has_ipv6();
        let mut published = wish.ports.iter();
        published.try_for_each(|port| ports::can_be_had(port, six))?;
        let (passt, tap, gate) =
            Passt::start(launch.settings, wish, mac, six, bounds, launch.journal)?;
        let names = resolver(wish, launch, Keeper::Holder(gate))?;
        let ip = |ip: IpAddr, prefix, gateway: IpAddr| {
            let address = format!("{ip}/{prefix}");
            serde_json::json!({"address": address, "gateway": gateway})
        };
        let mut shown = vec![ip(user::ADDRESS.into(), user::PREFIX, user::GATEWAY.into())];
        let mut ips = vec![user::ADDRESS.into()];
        if six {
            shown.push(ip(
                user::ADDRESS6.into(),
                user::PREFIX6,
                user::GATEWAY6.into(),
            ));
            ips.push(user::ADDRESS6.into());
        }
        let result = serde_json::json!({ "ips": shown });
        let path = network::result_file(bundle, &wish::interface(0));
        std::fs::write(&path, result.to_string()).map_err(NetworkFailure::Journal)?;
        let (tell, told) = oneshot::channel();
        std::thread::spawn(move || {
            let told = passt.ready().map(|()| Told {
                request: passt::request(mac, six),
                ips,
                kept: Kept {
                    _ports: Vec::new(),
                    passt: Some(passt),
                },
            });
            let _ = tell.send(told);
        });
        let device = Device {
            tap,
            mac: mac.0,
            mtu: user::MTU,
        };
        Ok(Self {
            devices: vec![device],
            kept: Kept::default(),
            names: Some(names),
            told,
        })
    }

    /// On the interfaces that are there.
    fn given(netns: &Path) -> Result<Self, NetworkFailure> {
        let join = || {
            let socket = Socket::open()?;
            let seen = Seen::here(&socket)?;
            let (mut devices, mut told) = (Vec::new(), Told::default());
            for (number, interface) in seen.interfaces.iter().enumerate() {
                let tap = tap::open(&tap_name(number))?;
                join(&socket, number, interface, false)?;
                seen.tell(interface, interface.mac, &mut told.request);
                devices.push(Device {
                    tap,
                    mac: interface.mac,
                    mtu: interface.mtu.clamp(68, MAX_MTU) as u16,
                });
            }
            Ok((devices, told))
        };
        let (devices, ready) =
            netns::enter(netns, join).map_err(|source| NetworkFailure::Netns {
                action: "join its interfaces with taps",
                netns: netns.to_owned(),
                source,
            })?;
        let (tell, told) = oneshot::channel();
        let _ = tell.send(Ok(ready));
        let kept = Kept::default();
        Ok(Self {
            devices,
            kept,
            names: None,
            told,
        })
    }

    /// The guest's end of the stream to the resolver, if it has one; to be had once.
    pub(super) fn names(&mut self) -> Option<OwnedFd> {
        self.names.take()
    }

    /// The devices as the VMM is told of them.
    pub(super) fn configs(&self, limits: &Limits) -> Vec<NetConfig> {
        let config = |device: &Device| NetConfig {
            tap: device.tap.as_raw_fd(),
            mac: device.mac,
            mtu: device.mtu,
            rate_limit: limits.network.map(plan::rate),
        };
        self.devices.iter().map(config).collect()
    }

    /// Their descriptors.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        self.devices.iter().map(|device| &device.tap)
    }

    /// Waits until it is whole. Whoever else holds the devices keeps them.
    pub(super) async fn ready(self) -> Result<Told, NetworkFailure> {
        let told = self.told.await.unwrap_or(Err(NetworkFailure::Thread))?;
        let kept = Kept {
            _ports: self.kept._ports,
            passt: told.kept.passt,
        };
        Ok(Told { kept, ..told })
    }
}

/// Gives back all of it, in a thread of its own: plugins take their time.
pub(super) async fn release(journal: &Journal) {
    let journal = journal.clone();
    let (tell, told) = oneshot::channel();
    std::thread::spawn(move || {
        let _busy = BUSY.lock().unwrap_or_else(|e| e.into_inner());
        let _ = tell.send(network::release(&journal));
    });
    if let Ok(Err(error)) = told.await {
        // It stays in the journal: the next command tries again, and tells.
        crate::rpc::complain(crate::rpc::chain(&error));
    }
}

/// Adds the container's addresses to the hosts file that it gets.
pub(super) fn add_to_hosts(
    request: &mut proto::CreateContainerRequest,
    spec: &Spec,
    ips: &[IpAddr],
) {
    let mount = |m: &&Mount| m.destination() == Path::new("/etc/hosts");
    let source = spec.mounts().iter().flatten().position(|m| mount(&m));
    let (Some(index), Some(name)) = (source, spec.hostname()) else {
        return;
    };
    let target = plan::file_target(&request.id, index);
    if let Some(file) = request.files.iter_mut().find(|f| f.path == target) {
        for ip in ips {
            file.content
                .extend_from_slice(format!("{ip}\t{name}\n").as_bytes());
        }
    }
}

/// Starts the sandbox's resolver and gives the guest's end of the stream to it.
fn resolver(wish: &Wish, launch: &Launch<'_>, keeper: Keeper) -> Result<OwnedFd, NetworkFailure> {
    let start = || {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let named = wish.egress.as_ref().map(|policy| &policy.names[..]);
        let names = Names {
            state_dir: launch.settings.state_dir.clone(),
            wish: wish.clone(),
            gate: Gate::new(named.unwrap_or_default(), keeper),
        };
        names::serve(names, ours.into())?;
        Ok(theirs.into())
    };
    start().map_err(NetworkFailure::Resolver)
}

/// The interfaces to make, from what the command line wrote.
fn planned(
    id: &str,
    wish: &Wish,
    netns: &Path,
    launch: &Launch<'_>,
) -> Result<Vec<Own>, NetworkFailure> {
    let settings = launch.settings;
    let dir = networks::dir_of(&settings.data_dir);
    let plan = |(number, attached): (usize, &wish::Attachment)| {
        let network = Network::load_or_default(&dir, &attached.network)?;
        let Mac(mac) = attached.mac;
        Ok(Own {
            mac,
            mtu: network.mtu(),
            attachment: Attachment {
                container: id.to_owned(),
                netns: netns.to_owned(),
                interface: wish::interface(number),
                plugins: settings.cni_dir(),
                network: network.for_plugins(&settings.state_dir),
                runtime: wish.runtime(number),
            },
        })
    };
    wish.attachments.iter().enumerate().map(plan).collect()
}

/// Has the plugins do their work and joins what they made with the taps.
fn fill(
    bundle: &Path,
    netns: &Path,
    own: &[Own],
    policy: Option<&Policy>,
    journal: &Journal,
) -> Result<Told, NetworkFailure> {
    let mut ips = Vec::new();
    for Own { attachment, .. } in own {
        let taken = Taken::Attachment {
            attachment: Box::new(attachment.clone()),
        };
        journal.record(&taken).map_err(NetworkFailure::Journal)?;
        let result = attachment.add()?;
        let outcome: Outcome = serde_json::from_value(result.clone()).unwrap_or_default();
        ips.extend(outcome.ips.iter().filter_map(cni::Ip::parts).map(|ip| ip.0));
        let path = network::result_file(bundle, &attachment.interface);
        std::fs::write(&path, result.to_string()).map_err(NetworkFailure::Journal)?;
    }
    let joined = netns::enter(netns, || {
        let socket = Socket::open()?;
        let seen = Seen::here(&socket)?;
        let mut request = proto::NetworkRequest::new();
        request.names_port = NAMES_PORT;
        if let Some(policy) = policy {
            // Before there is anything that it could be late for.
            let taps: Vec<String> = (0..own.len()).map(tap_name).collect();
            egress::enforce(policy, &ips, &taps)?;
        }
        for (number, own) in own.iter().enumerate() {
            let Some(interface) = seen.interface(&own.attachment.interface) else {
                return Ok(Err(number));
            };
            match policy {
                None => join(&socket, number, interface, true)?,
                Some(_) => {
                    let tap = seen.interface(&tap_name(number));
                    let tap = tap.ok_or(io::ErrorKind::NotFound)?;
                    egress::join(&socket, tap, interface, &format!("join{number}"))?;
                }
            }
            seen.tell(interface, own.mac, &mut request);
        }
        Ok(Ok(request))
    });
    match joined {
        Ok(Ok(request)) => Ok(Told {
            request,
            ips,
            kept: Kept::default(),
        }),
        Ok(Err(number)) => Err(NetworkFailure::NoInterface {
            network: own[number].attachment.network["name"].to_string(),
            interface: wish::interface(number),
        }),
        Err(source) => Err(NetworkFailure::Netns {
            action: "join its interfaces with taps",
            netns: netns.to_owned(),
            source,
        }),
    }
}

/// Keeps the host from sending on what comes from bridges without a way out: they have no address, but who knows theirs
/// on the link can still ask. After every start, as a network with a way out makes the host a router for all bridges.
fn seal(networks: &Path) -> Result<(), NetworkFailure> {
    let all = Network::all(networks)?;
    let internal = all.iter().filter(|network| network.ours.internal);
    internal
        .filter_map(Network::bridge)
        .try_for_each(tap::mute)
        .map_err(NetworkFailure::Seal)
}

/// Joins an interface with the tap of that number.
fn join(socket: &Socket, number: usize, interface: &Interface, guarded: bool) -> io::Result<()> {
    let name = tap_name(number);
    let seen = Seen::here(socket)?;
    let tap = seen.interface(&name).ok_or(io::ErrorKind::NotFound)?;
    tap::join(socket, tap, interface, guarded)
}
