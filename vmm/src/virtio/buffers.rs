//! Guest buffers as the host's I/O vectors: one cursor for copies and for system calls.
//!
//! Every address a descriptor names is checked against guest memory on the way
//! in, so that nothing here can leave it, whatever the guest wrote. The guest
//! may change the bytes at any time: copies are volatile and happen once.

// Vectored system calls and madvise take raw pointers into guest memory; this
// module is the one place that makes them.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Most vectors the kernel takes in one call (UIO_MAXIOV).
const MAX_VECTORS: usize = 1024;

/// A list of guest buffers, consumed from its front.
#[derive(Debug)]
pub struct Buffers {
    /// Keeps what the vectors point at mapped.
    memory: Arc<GuestMemoryMmap>,
    /// Each lies within one region of `memory` and isn't empty.
    vectors: Vec<libc::iovec>,
    /// Those before it are used up.
    first: usize,
    /// Bytes left in all of them.
    len: usize,
}

// SAFETY: the pointers lead into mappings that `memory` keeps alive from any thread; they are only used through `&mut self`.
unsafe impl Send for Buffers {}

impl Buffers {
    /// An empty list.
    pub fn new(memory: &Arc<GuestMemoryMmap>) -> Self {
        Buffers {
            memory: Arc::clone(memory),
            vectors: Vec::new(),
            first: 0,
            len: 0,
        }
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Vectors left.
    pub fn vectors(&self) -> usize {
        self.vectors.len() - self.first
    }

    /// Forgets all buffers.
    pub fn clear(&mut self) {
        self.vectors.clear();
        self.first = 0;
        self.len = 0;
    }

    /// Appends a guest buffer; false if any byte of it is outside guest memory.
    pub fn push(&mut self, address: GuestAddress, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        let Ok(slices) = self.memory.get_slices(address, len, Permissions::ReadWrite) else {
            return false;
        };
        let vectors = self.vectors.len();
        let total = self.len;
        for slice in slices {
            let Ok(slice) = slice else {
                self.vectors.truncate(vectors);
                self.len = total;
                return false;
            };
            let base = slice.ptr_guard_mut().as_ptr().cast();
            self.vectors.push(libc::iovec {
                iov_base: base,
                iov_len: slice.len(),
            });
            self.len += slice.len();
        }
        true
    }

    /// Appends what `other`, of the same memory, holds behind its first `skip` bytes.
    pub fn append(&mut self, other: &Buffers, mut skip: usize) {
        assert!(
            Arc::ptr_eq(&self.memory, &other.memory),
            "buffers of two memories"
        );
        for vector in &other.vectors[other.first..] {
            let skipped = skip.min(vector.iov_len);
            skip -= skipped;
            let iov_len = vector.iov_len - skipped;
            if iov_len > 0 {
                let iov_base = vector.iov_base.cast::<u8>().wrapping_add(skipped).cast();
                self.vectors.push(libc::iovec { iov_base, iov_len });
                self.len += iov_len;
            }
        }
    }

    /// Copies the front out; `None`, with nothing consumed, if fewer bytes are left.
    pub fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut data = [0; N];
        (self.len >= N).then(|| {
            let mut done = 0;
            self.consume(N, |slice| {
                slice.copy_to(&mut data[done..]);
                done += slice.len();
            });
            data
        })
    }

    /// Copies `data` to the front; false, with nothing consumed, if it doesn't fit.
    pub fn write(&mut self, data: &[u8]) -> bool {
        if self.len < data.len() {
            return false;
        }
        let mut done = 0;
        self.consume(data.len(), |slice| {
            slice.copy_from(&data[done..]);
            done += slice.len();
        });
        true
    }

    /// Copies as much of the front as fits into `out`; returns how much.
    pub fn read_slice(&mut self, out: &mut [u8]) -> usize {
        let count = out.len().min(self.len);
        let mut done = 0;
        self.consume(count, |slice| {
            slice.copy_to(&mut out[done..]);
            done += slice.len();
        });
        count
    }

    /// Writes `count` zeros (at most what is left).
    pub fn write_zeros(&mut self, count: usize) {
        const ZEROS: [u8; 4096] = [0; 4096];
        let count = count.min(self.len);
        self.consume(count, |slice| {
            let mut at = 0;
            while at < slice.len() {
                // Never fails: `at` is within the slice.
                at += slice
                    .write(&ZEROS[..ZEROS.len().min(slice.len() - at)], at)
                    .unwrap_or(slice.len());
            }
        });
    }

    /// Drops `count` bytes from the front (at most what is left).
    pub fn skip(&mut self, count: usize) {
        self.consume(count.min(self.len), |_| {});
    }

    /// Takes the last byte away and returns where it lies; `None` if nothing is left.
    pub fn split_last_byte(&mut self) -> Option<LastByte> {
        if self.len == 0 {
            return None;
        }
        let last = self.vectors.last_mut()?;
        last.iov_len -= 1;
        self.len -= 1;
        let address = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            self.vectors.pop();
        }
        Some(LastByte {
            _memory: Arc::clone(&self.memory),
            address,
        })
    }

    /// Fills up to `count` bytes from `file` at `offset`; returns how many came (0 at its end).
    pub fn read_at(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.transfer(count, |vectors, n| {
            // SAFETY: each of the `n` vectors lies within mapped guest memory.
            unsafe { libc::preadv2(file.as_raw_fd(), vectors, n, offset, 0) }
        })
    }

    /// Writes up to `count` bytes to `file` at `offset`; returns how many went.
    pub fn write_at(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        count: usize,
    ) -> io::Result<usize> {
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.transfer(count, |vectors, n| {
            // SAFETY: as in `read_at`.
            unsafe { libc::pwritev2(file.as_raw_fd(), vectors, n, offset, 0) }
        })
    }

    /// Receives up to `count` bytes from a socket, without waiting.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        self.transfer(count, |vectors, n| {
            let mut message = message(vectors, n);
            // SAFETY: as in `read_at`.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Fills up to `count` bytes from a tap.
    pub fn read_from(&mut self, fd: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        self.transfer(count, |vectors, n| {
            // SAFETY: as in `read_at`.
            unsafe { libc::readv(fd.as_raw_fd(), vectors, n) }
        })
    }

    /// Writes up to `count` bytes to a tap.
    pub fn write_to(&mut self, fd: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        self.transfer(count, |vectors, n| {
            // SAFETY: as in `read_at`.
            unsafe { libc::writev(fd.as_raw_fd(), vectors, n) }
        })
    }

    /// Sends up to `count` bytes on a socket, without SIGPIPE and without waiting.
    pub fn send(&mut self, socket: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
        self.transfer(count, |vectors, n| send_vectors(socket, vectors, n))
    }

    /// Fills up to `count` bytes with random data of the kernel; returns how many.
    pub fn fill_random(&mut self, count: usize) -> io::Result<usize> {
        let mut total = 0;
        while total < count && !self.is_empty() {
            let filled = self.transfer(count - total, |vectors, _| {
                // SAFETY: `transfer` passes at least one valid vector.
                let first = unsafe { *vectors };
                // SAFETY: the vector lies within mapped guest memory.
                unsafe { libc::getrandom(first.iov_base, first.iov_len, 0) }
            })?;
            total += filled;
        }
        Ok(total)
    }

    /// Gives the host pages behind the buffers back, with `advice`; their content is lost.
    ///
    /// What isn't made of whole, aligned pages is left alone: returns the bytes given back.
    pub fn give_back(&mut self, advice: Advice) -> io::Result<usize> {
        const PAGE: usize = 4096;
        let advice = match advice {
            Advice::Private => libc::MADV_DONTNEED,
            Advice::Shared => libc::MADV_REMOVE,
        };
        let mut total = 0;
        for vector in &self.vectors[self.first..] {
            let aligned = (vector.iov_base as usize).is_multiple_of(PAGE);
            if !aligned || !vector.iov_len.is_multiple_of(PAGE) {
                continue;
            }
            // SAFETY: whole pages of guest memory, which no Rust reference points into.
            if unsafe { libc::madvise(vector.iov_base, vector.iov_len, advice) } != 0 {
                return Err(io::Error::last_os_error());
            }
            total += vector.iov_len;
        }
        self.clear();
        Ok(total)
    }

    /// Runs `call` on the front, at most `count` bytes of it, and consumes what it returns.
    fn transfer(
        &mut self,
        count: usize,
        mut call: impl FnMut(*const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let count = count.min(self.len);
        if count == 0 {
            return Ok(0);
        }
        // The vector that `count` ends in is shortened for the call.
        let mut last = self.first;
        let mut bytes = self.vectors[last].iov_len;
        while bytes < count && last + 1 - self.first < MAX_VECTORS {
            last += 1;
            bytes += self.vectors[last].iov_len;
        }
        let excess = bytes.saturating_sub(count);
        self.vectors[last].iov_len -= excess;
        let n = (last + 1 - self.first) as libc::c_int;
        let done = loop {
            match call(self.vectors[self.first..].as_ptr(), n) {
                result if result >= 0 => break Ok(result as usize),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        break Err(error);
                    }
                }
            }
        };
        self.vectors[last].iov_len += excess;
        let done = done?;
        self.skip(done);
        Ok(done)
    }

    /// Consumes `count` bytes, which must be left, and shows each piece to `visit`.
    fn consume(&mut self, mut count: usize, mut visit: impl FnMut(&VolatileSlice<'_>)) {
        debug_assert!(count <= self.len);
        self.len -= count;
        while count > 0 {
            let vector = &mut self.vectors[self.first];
            let take = vector.iov_len.min(count);
            // SAFETY: `take` bytes of a vector within guest memory, mapped as long as `self.memory` lives.
            visit(&unsafe { VolatileSlice::new(vector.iov_base.cast(), take) });
            vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(take).cast();
            vector.iov_len -= take;
            count -= take;
            if vector.iov_len == 0 {
                self.first += 1;
            }
        }
    }
}

/// How the kernel gives pages of guest memory up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// Private mappings: the pages are dropped.
    Private,
    /// Shared mappings, which others see too: a hole is punched into their file.
    Shared,
}

impl Advice {
    /// The right one for `memory`.
    pub fn of(memory: &GuestMemoryMmap) -> Self {
        use vm_memory::GuestMemoryBackend;
        let shared = |region: &vm_memory::GuestRegionMmap| region.flags() & libc::MAP_SHARED != 0;
        if memory.iter().any(shared) {
            Advice::Shared
        } else {
            Advice::Private
        }
    }
}

/// One writable byte of guest memory: where a request's status goes.
#[derive(Debug)]
pub struct LastByte {
    /// Keeps `address` mapped.
    _memory: Arc<GuestMemoryMmap>,
    address: *mut u8,
}

impl LastByte {
    /// Stores the byte.
    pub fn write(&self, value: u8) {
        // SAFETY: the byte lies within guest memory, mapped as long as `_memory` lives.
        unsafe { self.address.write_volatile(value) }
    }
}

/// Sends the host's own bytes on a socket, without SIGPIPE and without waiting.
pub(crate) fn send(socket: BorrowedFd<'_>, parts: [&[u8]; 2]) -> io::Result<usize> {
    let vectors = parts.map(|part| libc::iovec {
        iov_base: part.as_ptr().cast_mut().cast(),
        iov_len: part.len(),
    });
    loop {
        let sent = send_vectors(socket, vectors.as_ptr(), 2);
        if sent >= 0 {
            return Ok(sent as usize);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn send_vectors(
    socket: BorrowedFd<'_>,
    vectors: *const libc::iovec,
    count: libc::c_int,
) -> libc::ssize_t {
    let message = message(vectors, count);
    // SAFETY: the callers' vectors are valid for reads.
    unsafe {
        libc::sendmsg(
            socket.as_raw_fd(),
            &message,
            libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT,
        )
    }
}

fn message(vectors: *const libc::iovec, count: libc::c_int) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr: no name, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.cast_mut();
    message.msg_iovlen = count as usize;
    message
}

/// Waits until `fd` can be written to or has failed; false when `timeout` is over.
pub(crate) fn wait_writable(fd: BorrowedFd<'_>, timeout: Duration) -> bool {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    let timeout = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one valid entry.
    unsafe { libc::poll(&mut entry, 1, timeout) > 0 }
}

/// Throws away what a socket has received, at most `limit` bytes.
pub(crate) fn discard_input(socket: BorrowedFd<'_>, limit: usize) {
    let mut scratch = [0u8; 4096];
    let mut left = limit;
    while left > 0 {
        // SAFETY: `scratch` is valid for writes of its length.
        let count = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                scratch.as_mut_ptr().cast(),
                scratch.len(),
                libc::MSG_DONTWAIT,
            )
        };
        match usize::try_from(count) {
            Ok(count @ 1..) => left = left.saturating_sub(count),
            _ => return,
        }
    }
}
