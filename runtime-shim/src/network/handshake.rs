//! The end of a connection's handshake, in passt's place.
//!
//! Debian 12's passt (0.0~git20230309) takes a connection that a guest accepts without telling the guest so: it does with
//! the first data of the client. A guest that is to speak first waits for it for ever. So the guest's SYN, ACK is
//! answered here, with what a later passt says too: to hear it twice does no harm.

// linux/if_ether.h, in.h; RFC 9293, section 3.1
const ETHERNET: usize = 14;
const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const TCP: u8 = 6;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// With passt's scale (7) what the window of its SYN says.
const WINDOW: u16 = 512;

/// What is to be answered to a guest's frame: something if it accepts a connection with it.
pub(super) fn acknowledgement(frame: &[u8]) -> Option<Vec<u8>> {
    let (ethernet, packet) = frame.split_first_chunk::<ETHERNET>()?;
    let mut reply = [&ethernet[6..12], &ethernet[..6], &ethernet[12..]].concat();
    // Of both addresses, for the checksum.
    let (addresses, tcp) = match [ethernet[12], ethernet[13]] {
        IPV4 => {
            let length = usize::from(packet.first()? & 0x0f) * 4;
            let (header, _) = packet.split_first_chunk::<IPV4_HEADER>()?;
            let is_fragment = (header[6] & 0x3f, header[7]) != (0, 0);
            if header[0] >> 4 != 4 || length < IPV4_HEADER || header[9] != TCP || is_fragment {
                return None;
            }
            let mut answer = [0; IPV4_HEADER];
            answer[0] = 0x45;
            answer[3] = (IPV4_HEADER + TCP_HEADER) as u8;
            // It is not to be cut; 64 hops.
            answer[6] = 0x40;
            answer[8] = 64;
            answer[9] = TCP;
            answer[12..16].copy_from_slice(&header[16..20]);
            answer[16..20].copy_from_slice(&header[12..16]);
            let sum = checksum(&[&answer]);
            answer[10..12].copy_from_slice(&sum);
            reply.extend(answer);
            (answer[12..20].to_vec(), packet.get(length..)?)
        }
        IPV6 => {
            let (header, tcp) = packet.split_first_chunk::<IPV6_HEADER>()?;
            if header[0] >> 4 != 6 || header[6] != TCP {
                return None;
            }
            let mut answer = [0; IPV6_HEADER];
            answer[0] = 0x60;
            answer[5] = TCP_HEADER as u8;
            answer[6] = TCP;
            answer[7] = 64;
            answer[8..24].copy_from_slice(&header[24..40]);
            answer[24..40].copy_from_slice(&header[8..24]);
            reply.extend(answer);
            (answer[8..40].to_vec(), tcp)
        }
        _ => return None,
    };
    reply.extend(segment(&addresses, tcp)?);
    Some(reply)
}

/// The answer to a segment that accepts a connection.
fn segment(addresses: &[u8], accepted: &[u8]) -> Option<[u8; TCP_HEADER]> {
    let (accepted, _) = accepted.split_first_chunk::<TCP_HEADER>()?;
    if accepted[13] & (FIN | SYN | RST | ACK) != SYN | ACK {
        return None;
    }
    let sequence = u32::from_be_bytes(*accepted[4..].first_chunk()?);
    let mut answer = [0; TCP_HEADER];
    answer[..2].copy_from_slice(&accepted[2..4]);
    answer[2..4].copy_from_slice(&accepted[..2]);
    answer[4..8].copy_from_slice(&accepted[8..12]);
    // A SYN counts as one byte.
    answer[8..12].copy_from_slice(&sequence.wrapping_add(1).to_be_bytes());
    answer[12] = (TCP_HEADER as u8 / 4) << 4;
    answer[13] = ACK;
    answer[14..16].copy_from_slice(&WINDOW.to_be_bytes());
    let sum = checksum(&[addresses, &[0, TCP, 0, TCP_HEADER as u8], &answer]);
    answer[16..18].copy_from_slice(&sum);
    Some(answer)
}

/// RFC 1071; each part has an even length.
pub(super) fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let words = parts.iter().flat_map(|part| part.chunks_exact(2));
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const PASST: [u8; 6] = [2, 0, 0, 0, 0, 2];

    /// From port 8080 of a guest, with these flags.
    fn tcp(flags: u8) -> Vec<u8> {
        let mut tcp = vec![0x1f, 0x90, 0x88, 0xb8];
        tcp.extend(0xffff_ffff_u32.to_be_bytes());
        tcp.extend(7_u32.to_be_bytes());
        // With an option, which moves nothing of it.
        tcp.extend([0x60, flags, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4]);
        tcp
    }

    fn four(flags: u8) -> Vec<u8> {
        let mut frame = [&PASST[..], &GUEST, &IPV4].concat();
        frame.extend([0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, TCP, 0, 0]);
        frame.extend([10, 189, 0, 2, 10, 189, 0, 1]);
        frame.extend(tcp(flags));
        frame
    }

    fn six(flags: u8) -> Vec<u8> {
        let mut frame = [&PASST[..], &GUEST, &IPV6].concat();
        frame.extend([0x60, 0, 0, 0, 0, 24, TCP, 64]);
        frame.extend([[0xfd; 16], [0xfe; 16]].concat());
        frame.extend(tcp(flags));
        frame
    }

    /// Ports, sequence, what is acknowledged, and the rest but for the checksum.
    const ANSWER: [u8; 16] = [
        0x88, 0xb8, 0x1f, 0x90, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, ACK, 2, 0,
    ];

    #[test]
    fn acceptance_is_acknowledged_to_the_guest() {
        let reply = acknowledgement(&four(SYN | ACK)).unwrap();
        assert_eq!(reply[..14], [&GUEST[..], &PASST, &IPV4].concat());
        assert_eq!(reply[26..34], [10, 189, 0, 1, 10, 189, 0, 2]);
        assert_eq!(reply[34..50], ANSWER);
        // A sum with the right checksum in it is nothing.
        assert_eq!(checksum(&[&reply[14..34]]), [0, 0]);
        let pseudo = [&reply[26..34], &[0, TCP, 0, 20], &reply[34..]];
        assert_eq!(checksum(&pseudo), [0, 0]);
        assert_eq!(reply.len(), 54);

        let reply = acknowledgement(&six(SYN | ACK)).unwrap();
        assert_eq!(reply[22..54], [[0xfe; 16], [0xfd; 16]].concat());
        assert_eq!(reply[54..70], ANSWER);
        let pseudo = [&reply[22..54], &[0, TCP, 0, 20], &reply[54..]];
        assert_eq!((checksum(&pseudo), reply.len()), ([0, 0], 74));
    }

    #[test]
    fn everything_else_is_left_to_passt() {
        for flags in [0, SYN, ACK, FIN | ACK, SYN | ACK | RST, SYN | ACK | FIN] {
            assert_eq!(acknowledgement(&four(flags)), None, "{flags:x}");
            assert_eq!(acknowledgement(&six(flags)), None, "{flags:x}");
        }
        let whole = four(SYN | ACK);
        for end in 0..54 {
            assert_eq!(acknowledgement(&whole[..end]), None, "{end}");
        }
        // A tag, UDP, a fragment, a header that is too short or longer than the frame.
        for (at, byte) in [
            (12, 0x81),
            (23, 17),
            (20, 0x20),
            (21, 1),
            (14, 0x44),
            (14, 0x4f),
        ] {
            let mut frame = whole.clone();
            frame[at] = byte;
            assert_eq!(acknowledgement(&frame), None, "{at}: {byte:x}");
        }
    }

    proptest::proptest! {
        #[test]
        fn frame_of_anything_never_panics(mut frame in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..120), six: bool) {
            if frame.len() > 14 {
                frame[12..14].copy_from_slice(if six { &IPV6 } else { &IPV4 });
            }
            if let Some(reply) = acknowledgement(&frame) {
                proptest::prop_assert!([54, 74].contains(&reply.len()));
            }
        }
    }
}
