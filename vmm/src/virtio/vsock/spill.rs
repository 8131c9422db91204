//! Bytes from the guest that the host's socket didn't take yet: a ring of fixed size.

use crate::virtio::buffers::Buffers;

/// A ring of at most `N` bytes, allocated when first needed.
#[derive(Debug, Default)]
pub(super) struct Spill<const N: usize> {
    data: Box<[u8]>,
    start: usize,
    len: usize,
}

impl<const N: usize> Spill<N> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the front of `from` in; `count` fits, as the guest's credit says.
    pub(super) fn push(&mut self, from: &mut Buffers, count: usize) {
        assert!(
            count <= N - self.len,
            "credit let {count} bytes in, but only {} fit",
            N - self.len
        );
        if self.data.is_empty() {
            // Zeroed lazily by the kernel: only what is used costs memory.
            self.data = vec![0; N].into_boxed_slice();
        }
        let end = (self.start + self.len) % N;
        let first = count.min(N - end);
        let mut copied = from.read_slice(&mut self.data[end..end + first]);
        copied += from.read_slice(&mut self.data[..count - first]);
        self.len += copied;
    }

    /// What is held, oldest first.
    pub(super) fn parts(&self) -> [&[u8]; 2] {
        let first = self.len.min(self.data.len() - self.start);
        [
            &self.data[self.start..self.start + first],
            &self.data[..self.len - first],
        ]
    }

    /// Forgets the oldest `count` bytes.
    pub(super) fn consume(&mut self, count: usize) {
        assert!(count <= self.len);
        self.len -= count;
        self.start = if self.len == 0 {
            0
        } else {
            (self.start + count) % N
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing;
    use proptest::prelude::*;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    proptest! {
        #[test]
        fn spill_any_pushes_and_consumes_equals_a_queue(steps in proptest::collection::vec((0..=16usize, 0..=16usize), 0..40)) {
            let memory = Arc::new(testing::memory());
            let mut spill = Spill::<16>::default();
            let mut model = std::collections::VecDeque::new();
            let mut next = 0u8;
            for (push, consume) in steps {
                let push = push.min(16 - spill.len());
                let bytes: Vec<u8> = (0..push).map(|_| { next = next.wrapping_add(1); next }).collect();
                memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
                let mut buffers = Buffers::new(&memory);
                prop_assert!(buffers.push(GuestAddress(0x1000), push));
                spill.push(&mut buffers, push);
                model.extend(bytes);
                let consume = consume.min(spill.len());
                prop_assert_eq!(&spill.parts().concat()[..consume], model.drain(..consume).collect::<Vec<_>>());
                spill.consume(consume);
                prop_assert_eq!(spill.len(), model.len());
                prop_assert_eq!(spill.is_empty(), model.is_empty());
            }
        }
    }
}
