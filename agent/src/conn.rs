//! Byte streams to the host: vsock in a guest; Unix sockets where the agent runs without a VM (its tests).
#![allow(unsafe_code)] // AF_VSOCK is in no safe wrapper we have; AsyncFd registration

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Where ports of the host are found.
#[derive(Debug, Clone)]
pub enum Host {
    /// Vsock context id of the host.
    Vsock(u32),
    /// A directory with one Unix socket per port, named by its number.
    Unix(PathBuf),
}

impl Host {
    /// Connects to `port` of the host.
    pub async fn connect(&self, port: u32) -> io::Result<Conn> {
        let conn = match self {
            Host::Vsock(cid) => Conn::new(vsock_connect(*cid, port)?)?,
            Host::Unix(dir) => Conn::new(
                std::os::unix::net::UnixStream::connect(dir.join(port.to_string()))?.into(),
            )?,
        };
        conn.ready(Interest::WRITABLE).await?;
        rustix::net::sockopt::socket_error(conn.as_fd())??;
        Ok(conn)
    }
}

fn vsock_connect(cid: u32, port: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain system call.
    let fd = unsafe {
        libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` is open and ours.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: zeros are a valid sockaddr_vm.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    // SAFETY: the address lives across the call and its size is given.
    let result = unsafe {
        libc::connect(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    };
    match io::Error::last_os_error() {
        error if result < 0 && error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(fd),
    }
}

/// A descriptor in tokio's hands: a connection, a pipe end or a terminal.
#[derive(Debug)]
pub struct Conn(AsyncFd<OwnedFd>);

impl Conn {
    /// Takes over `fd`, makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        }
        // SAFETY: the descriptor is owned, and stays the same until the AsyncFd is dropped.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)?;
        Ok(Self(fd))
    }

    /// Waits until `interest` truly holds (tokio only caches edges), or the peer hung up.
    pub(crate) async fn ready(&self, interest: Interest) -> io::Result<()> {
        loop {
            let mut guard = self.0.ready(interest).await?;
            if self.holds(interest)? {
                return Ok(());
            }
            guard.clear_ready();
        }
    }

    /// Whether `interest` holds now.
    pub(crate) fn holds(&self, interest: Interest) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, interest.is_readable());
        flags.set(PollFlags::OUT, interest.is_writable());
        flags.set(PollFlags::PRI, interest.is_priority());
        let zero = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        Ok(poll(&mut [PollFd::new(&self.0, flags)], Some(&zero))? > 0)
    }

    /// Reads at least one byte; 0 is the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(self.as_fd(), &mut *buffer) {
                Err(rustix::io::Errno::AGAIN) => self.ready(Interest::READABLE).await?,
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Writes all of `bytes`.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::write(self.as_fd(), bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(rustix::io::Errno::AGAIN) => self.ready(Interest::WRITABLE).await?,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl AsFd for Conn {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsRawFd for Conn {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsyncRead for Conn {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let result = guard.try_io(|fd| Ok(rustix::io::read(fd, buffer.initialize_unfilled())?));
            if let Ok(result) = result {
                return Poll::Ready(result.map(|count| buffer.advance(count)));
            }
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(result) = guard.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
                return Poll::Ready(result);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(rustix::net::shutdown(
            self.as_fd(),
            rustix::net::Shutdown::Write,
        )?))
    }
}

/// A kernel file that announces changes of its content (POLLPRI), such as `cgroup.events`.
pub(crate) struct Events(AsyncFd<OwnedFd>);

impl Events {
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is owned, and stays the same until the AsyncFd is dropped.
        Ok(Self(
            unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }
                .map_err(io::Error::from)?,
        ))
    }

    /// Returns after a change since the last read of the file.
    pub(crate) async fn changed(&mut self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}
