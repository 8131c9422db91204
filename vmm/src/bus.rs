//! The two address spaces of devices, I/O ports and memory-mapped registers:
//! built once, then read by all vCPUs without a lock.

use std::sync::Arc;

/// A device on a bus; offsets are relative to its start.
pub trait BusDevice: Send + Sync {
    /// Fills `data`, which holds zeros.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Address ranges and their devices, sorted.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

struct Range {
    start: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

impl Bus {
    /// Puts a device at `start`. Overlapping ranges are a mistake of the caller.
    pub fn insert(&mut self, start: u64, size: u64, device: Arc<dyn BusDevice>) {
        let at = self.ranges.partition_point(|range| range.start < start);
        let free = |range: &Range| range.start + range.size <= start || start + size <= range.start;
        assert!(
            self.ranges.iter().all(free),
            "{start:#x}: overlaps a device"
        );
        self.ranges.insert(
            at,
            Range {
                start,
                size,
                device,
            },
        );
    }

    /// Reads; where no device is, the bus floats: all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((range, offset)) => {
                data.fill(0);
                range.device.read(offset, data);
            }
            None => data.fill(0xff),
        }
    }

    /// Writes; where no device is, nothing happens.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((range, offset)) = self.find(address, data.len()) {
            range.device.write(offset, data);
        }
    }

    /// The device that holds the whole access.
    fn find(&self, address: u64, len: usize) -> Option<(&Range, u64)> {
        let behind = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(behind.checked_sub(1)?)?;
        let offset = address - range.start;
        let end = offset.checked_add(len as u64)?;
        (end <= range.size).then_some((range, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Remembers writes, reads as its own byte.
    struct Recorder(u8, Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.1.lock().expect("lock").push((offset, data.to_vec()));
        }
    }

    fn recorder(byte: u8) -> Arc<Recorder> {
        Arc::new(Recorder(byte, Mutex::default()))
    }

    #[test]
    fn read_unmapped_gives_all_ones() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, recorder(1));

        for address in [0, 0xfff, 0x1010, 0x100f, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
    }

    #[test]
    fn read_mapped_reaches_the_right_device() {
        let mut bus = Bus::default();
        bus.insert(0x2000, 0x1000, recorder(2));
        bus.insert(0x1000, 0x1000, recorder(1));

        let mut data = [0; 2];
        bus.read(0x2ffe, &mut data);
        assert_eq!(data, [2, 2]);
        bus.read(0x1000, &mut data);
        assert_eq!(data, [1, 1]);
    }

    #[test]
    fn write_passes_the_offset() {
        let device = recorder(0);
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, device.clone());

        bus.write(0x1004, &[7]);
        bus.write(0x5000, &[9]);

        assert_eq!(*device.1.lock().expect("lock"), [(4, vec![7])]);
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn insert_overlapping_panics() {
        let mut bus = Bus::default();
        bus.insert(0x1000, 0x10, recorder(1));
        bus.insert(0x100f, 1, recorder(2));
    }
}
