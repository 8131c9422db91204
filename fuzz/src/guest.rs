//! A guest that does anything: writes its memory, its rings and the device's registers in any order.

use casemate_vmm::virtio::Device;
use casemate_vmm::virtio::testing::{Desc, Driver, MEMORY_END};
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};

/// Actions looked at in one input: more only slows the search down.
const MAX_ACTIONS: usize = 48;

/// An address, mostly in memory, often near something of interest.
#[derive(Debug, Clone, Copy)]
pub struct Address(pub u64);

impl<'a> Arbitrary<'a> for Address {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        const EDGES: [u64; 7] = [0, 0x1000, 1 << 20, 4 << 20, 6 << 20, 8 << 20, MEMORY_END];
        Ok(Address(match input.int_in_range(0..=9)? {
            0 => u64::arbitrary(input)?,
            1..=3 => input
                .choose(&EDGES)?
                .wrapping_add_signed(i8::arbitrary(input)?.into()),
            4 => u64::from(u32::arbitrary(input)?) % (MEMORY_END + 0x1_0000),
            // Where buffers usually lie, few enough to meet again.
            _ => (1 << 20) + u64::from(u8::arbitrary(input)?) * 64,
        }))
    }
}

/// A length, mostly small.
#[derive(Debug, Clone, Copy)]
pub struct Length(pub u32);

impl<'a> Arbitrary<'a> for Length {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        const USUAL: [u32; 12] = [0, 1, 4, 8, 16, 44, 512, 513, 1024, 4096, 65536, 65580];
        Ok(Length(match input.int_in_range(0..=9)? {
            0 => u32::arbitrary(input)?,
            1..=5 => *input.choose(&USUAL)?,
            _ => u8::arbitrary(input)?.into(),
        }))
    }
}

/// A buffer of a chain.
#[derive(Debug, Arbitrary)]
pub struct Buffer {
    address: Address,
    len: Length,
    writable: bool,
    /// Written to the buffer's start.
    content: Vec<u8>,
}

/// What a guest's driver may do.
#[derive(Debug, Arbitrary)]
pub enum Action {
    /// An honest chain.
    Chain { queue: u8, buffers: Vec<Buffer> },
    /// One descriptor, any flags.
    Descriptor {
        queue: u8,
        index: u8,
        address: Address,
        len: Length,
        flags: u8,
        next: u8,
    },
    /// Any head.
    Offer { queue: u8, head: u16 },
    /// Any end of the available ring.
    AvailIndex { queue: u8, index: u16 },
    /// Any bytes anywhere, rings included.
    Write { address: Address, bytes: Vec<u8> },
    /// Takes back what is used.
    TakeUsed { queue: u8 },
    /// The configuration space.
    Config { offset: u8, bytes: Vec<u8> },
    /// Pause and resume.
    StopAndGo,
    /// What the other side of the device does.
    Host { what: u8, number: u32 },
}

/// Features beyond the device's own and where the rings lie.
#[derive(Debug, Arbitrary)]
pub struct Setup {
    /// Those that the driver leaves out.
    without: u64,
    disabled: u8,
    moved: Option<(u8, u8, Address)>,
}

/// One input.
#[derive(Debug, Arbitrary)]
pub struct Play {
    setup: Setup,
    actions: Vec<Action>,
}

impl Play {
    /// Plays against `device`; `host` acts for the other side.
    pub fn run<D: Device>(self, device: &mut D, mut host: impl FnMut(&mut D, u8, u32)) {
        let mut driver = Driver::new(device);
        self.setup.apply(&mut driver);
        let features = device.features() & !self.setup.without;
        if device.activate(driver.activation(features)).is_err() {
            return;
        }
        for action in self.actions.into_iter().take(MAX_ACTIONS) {
            match action {
                Action::StopAndGo => {
                    let queues = device.stop();
                    if device
                        .activate(driver.reactivation(queues, features))
                        .is_err()
                    {
                        return;
                    }
                }
                Action::Host { what, number } => host(device, what, number),
                Action::Config { offset, bytes } => {
                    device.write_config(offset.into(), &bytes);
                    device.read_config(offset.into(), &mut [0; 16]);
                }
                other => other.apply(&mut driver),
            }
            settle(&driver, device);
        }
        device.save();
        device.stop();
    }

    /// Only lays the rings, for what isn't a device.
    pub fn lay(self, driver: &mut Driver) {
        self.setup.apply(driver);
        for action in self.actions.into_iter().take(MAX_ACTIONS) {
            action.apply(driver);
        }
    }
}

/// Lets the device work, but not for ever: rings that overlap buffers or each other can feed themselves.
fn settle(driver: &Driver, device: &mut dyn Device) {
    for _ in 0..100 {
        if !driver.turn(device) {
            return;
        }
    }
}

impl Setup {
    fn apply(&self, driver: &mut Driver) {
        for (index, queue) in driver.queues.iter_mut().enumerate() {
            queue.disabled = self.disabled & 0xc0 == 0xc0 && self.disabled & 1 << index != 0;
        }
        if let Some((queue, which, Address(address))) = self.moved {
            let index = usize::from(queue) % driver.queues.len();
            let queue = &mut driver.queues[index];
            match which % 3 {
                0 => queue.desc = address & !15,
                1 => queue.avail = address & !1,
                _ => queue.used = address & !3,
            }
        }
    }
}

impl Action {
    fn apply(self, driver: &mut Driver) {
        let count = driver.queues.len();
        let at = |queue: u8| usize::from(queue) % count;
        match self {
            Action::Chain { queue, buffers } => {
                let mut chain = Vec::new();
                for Buffer {
                    address: Address(address),
                    len: Length(len),
                    writable,
                    mut content,
                } in buffers
                {
                    content.truncate(len as usize);
                    driver.try_write(address, &content);
                    chain.push(if writable {
                        Desc::writable(address, len)
                    } else {
                        Desc::readable(address, len)
                    });
                }
                let queue = &mut driver.queues[at(queue)];
                chain.truncate(queue.size.into());
                if !chain.is_empty() {
                    queue.add(&chain);
                }
                queue.kick();
            }
            Action::Descriptor {
                queue,
                index,
                address,
                len,
                flags,
                next,
            } => {
                let desc = Desc {
                    addr: address.0,
                    len: len.0,
                    flags: flags.into(),
                    next: next.into(),
                };
                let queue = &driver.queues[at(queue)];
                driver.try_write(
                    queue.desc.wrapping_add(16 * u64::from(index)),
                    &desc.bytes(),
                );
            }
            Action::Offer { queue, head } => {
                driver.queues[at(queue)].offer(head);
                driver.queues[at(queue)].kick();
            }
            Action::AvailIndex { queue, index } => {
                let queue = &driver.queues[at(queue)];
                driver.try_write(queue.avail.wrapping_add(2), &index.to_le_bytes());
                queue.kick();
            }
            Action::Write { address, bytes } => driver.try_write(address.0, &bytes),
            Action::TakeUsed { queue } => drop(driver.queues[at(queue)].take_used()),
            Action::Config { .. } | Action::StopAndGo | Action::Host { .. } => {}
        }
    }
}
