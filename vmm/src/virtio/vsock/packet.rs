//! The header of a vsock packet (virtio 1.2, section 5.10.6).

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host's CID.
pub(super) const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub(super) const TYPE_STREAM: u16 = 1;
/// The sender won't receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender won't send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// VIRTIO_VSOCK_OP_*.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data that follow.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes that the sender can hold for this connection.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender has passed on so far, wrapping.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Any 44 bytes are a header; what they say is checked by whom it concerns.
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Header {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    /// As it goes on the wire.
    pub(super) fn bytes(&self) -> [u8; HEADER] {
        let Header {
            src_cid,
            dst_cid,
            src_port,
            dst_port,
            len,
            kind,
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        } = self;
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&len.to_le_bytes());
        bytes[28..30].copy_from_slice(&kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&op.to_le_bytes());
        bytes[32..36].copy_from_slice(&flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&fwd_cnt.to_le_bytes());
        bytes
    }

    /// The refusal of this packet.
    pub(super) fn reset(&self) -> Self {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_known_bytes_parses_by_the_specification() {
        let bytes: [u8; HEADER] = std::array::from_fn(|i| i as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(
            (header.len, header.kind, header.op),
            (0x1b1a_1918, 0x1d1c, 0x1f1e)
        );
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
    }

    proptest! {
        #[test]
        fn header_any_bytes_survive_a_round_trip(bytes in any::<[u8; HEADER]>()) {
            prop_assert_eq!(Header::parse(&bytes).bytes(), bytes);
        }
    }
}
