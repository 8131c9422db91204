//! The containers' resolver: takes their questions and has the host answer them.
//!
//! Frames on one stream, each a DNS message behind its length, as DNS over TCP has it. What is asked and answered is
//! the host's business; here only the message's number is changed, to tell whose answer it is.

use std::net::{Ipv4Addr, SocketAddr};

use casemate_protocol::RESOLVER;
use tokio::net::UdpSocket;

use crate::conn::{Conn, Host};
use crate::error::{Attempt, Result};

/// Questions that may wait for their answers; older ones are forgotten, and asked again.
const WAITING: usize = 256;
/// A question's and, with EDNS, an answer's size.
const MAX_MESSAGE: usize = 4096;
/// Of the length before a message.
const LENGTH: usize = 2;

/// Who asked, and under which number.
type Asker = Option<(SocketAddr, [u8; 2])>;

/// Connects to the host and serves from then on.
pub(crate) async fn serve(host: &Host, port: u32) -> Result<()> {
    let stream = host.connect(port).await;
    let stream = stream.attempt(|| "connect to the host's resolver".into())?;
    let [a, b, c, d] = RESOLVER;
    let socket = UdpSocket::bind((Ipv4Addr::new(a, b, c, d), 53)).await;
    let socket = socket.attempt(|| "serve as resolver".into())?;
    tokio::spawn(async move {
        // The host's end of the stream is the end of it.
        let _ = relay(&socket, &stream).await;
    });
    Ok(())
}

async fn relay(socket: &UdpSocket, stream: &Conn) -> std::io::Result<()> {
    let mut askers: Vec<Asker> = vec![None; WAITING];
    let mut next = 0;
    let mut question = [0; MAX_MESSAGE];
    let mut chunk = [0; MAX_MESSAGE];
    let mut unread = Vec::new();
    loop {
        tokio::select! {
            received = socket.recv_from(&mut question) => {
                // An error is that of an asker who is gone.
                let Ok((length @ 2.., asker)) = received else { continue };
                askers[next] = Some((asker, [question[0], question[1]]));
                question[..2].copy_from_slice(&(next as u16).to_be_bytes());
                next = (next + 1) % WAITING;
                let mut frame = (length as u16).to_be_bytes().to_vec();
                frame.extend_from_slice(&question[..length]);
                stream.write_all(&frame).await?;
            }
            read = stream.read(&mut chunk) => {
                let count = read?;
                if count == 0 {
                    return Ok(());
                }
                unread.extend_from_slice(&chunk[..count]);
                while let Some(mut answer) = take_frame(&mut unread) {
                    if let Some((asker, id)) = whose(&answer, &mut askers) {
                        answer[..2].copy_from_slice(&id);
                        let _ = socket.send_to(&answer, asker).await;
                    }
                }
            }
        }
    }
}

/// The first whole message of what was read.
fn take_frame(unread: &mut Vec<u8>) -> Option<Vec<u8>> {
    let length = u16::from_be_bytes(*unread.first_chunk()?);
    let end = LENGTH + usize::from(length);
    if unread.len() < end {
        return None;
    }
    let frame = unread.drain(..end).skip(LENGTH).collect();
    Some(frame)
}

/// Who is waiting for this answer.
fn whose(answer: &[u8], askers: &mut [Asker]) -> Asker {
    let number = u16::from_be_bytes(*answer.first_chunk()?);
    askers.get_mut(usize::from(number))?.take()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn take_frame_waits_for_the_whole() {
        let mut unread = vec![0, 3, 1, 2];
        assert_eq!(take_frame(&mut unread), None);
        unread.extend([3, 0]);
        assert_eq!(take_frame(&mut unread), Some(vec![1, 2, 3]));
        assert_eq!(unread, [0]);
    }

    #[test]
    fn whose_knows_each_asker_once() {
        let asker = ("127.0.0.1:5".parse().unwrap(), [9, 9]);
        let mut askers = [None, Some(asker)];
        assert_eq!(whose(&[0, 1, 5], &mut askers), Some(asker));
        for answer in [&[0, 1][..], &[0, 0], &[9, 9], &[1], &[]] {
            assert_eq!(whose(answer, &mut askers), None);
        }
    }
}
