//! The connection to the agent, as far as it must be distrusted.
//!
//! ttrpc's client keeps a mailbox without bound for each call, and a peer may
//! fill it with data frames. [`Guarded`] lets only what we use pass: responses,
//! one for each request, no longer than ttrpc's own limit. Anything else ends the
//! connection.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE};

/// Calls in flight: a shim makes a handful.
const MAX_OUTSTANDING: usize = 4096;

/// Follows a byte stream of ttrpc frames.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; MESSAGE_HEADER_LENGTH],
    filled: usize,
    payload_left: usize,
}

/// The part of a frame's header that matters here.
#[derive(Debug, PartialEq, Eq)]
struct Header {
    length: usize,
    stream: u32,
    kind: u8,
}

impl Frames {
    /// Feeds bytes; `each` sees every header once it is complete.
    fn feed(
        &mut self,
        mut bytes: &[u8],
        mut each: impl FnMut(Header) -> io::Result<()>,
    ) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let skip = self.payload_left.min(bytes.len());
                self.payload_left -= skip;
                bytes = &bytes[skip..];
                continue;
            }
            let take = (MESSAGE_HEADER_LENGTH - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + take].copy_from_slice(&bytes[..take]);
            self.filled += take;
            bytes = &bytes[take..];
            if self.filled == MESSAGE_HEADER_LENGTH {
                let [l0, l1, l2, l3, s0, s1, s2, s3, kind, _flags] = self.header;
                let header = Header {
                    length: u32::from_be_bytes([l0, l1, l2, l3]) as usize,
                    stream: u32::from_be_bytes([s0, s1, s2, s3]),
                    kind,
                };
                self.filled = 0;
                self.payload_left = header.length;
                each(header)?;
            }
        }
        Ok(())
    }
}

/// A stream to the agent that ends at the first frame we didn't ask for.
#[derive(Debug)]
pub(super) struct Guarded<S> {
    stream: S,
    sent: Frames,
    received: Frames,
    outstanding: HashSet<u32>,
    broken: bool,
}

impl<S> Guarded<S> {
    /// Guards `stream`.
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            sent: Frames::default(),
            received: Frames::default(),
            outstanding: HashSet::new(),
            broken: false,
        }
    }

    fn check_received(&mut self, bytes: &[u8]) -> io::Result<()> {
        let outstanding = &mut self.outstanding;
        self.received.feed(bytes, |header| {
            let problem = if header.length > casemate_protocol::MAX_MESSAGE {
                "a frame that is too long"
            } else if header.kind != MESSAGE_TYPE_RESPONSE {
                "a frame that is no response"
            } else if !outstanding.remove(&header.stream) {
                "a response that nobody asked for"
            } else {
                return Ok(());
            };
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the agent sent {problem}: {header:?}"),
            ))
        })
    }

    fn note_sent(&mut self, bytes: &[u8]) -> io::Result<()> {
        let outstanding = &mut self.outstanding;
        self.sent.feed(bytes, |header| {
            if header.kind == MESSAGE_TYPE_REQUEST {
                if outstanding.len() >= MAX_OUTSTANDING {
                    return Err(io::Error::other("too many calls of the agent at once"));
                }
                outstanding.insert(header.stream);
            }
            Ok(())
        })
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.broken {
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        }
        let before = buf.filled().len();
        std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let checked = self.check_received(&buf.filled()[before..]);
        if checked.is_err() {
            self.broken = true;
            buf.set_filled(before);
        }
        Poll::Ready(checked)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = std::task::ready!(Pin::new(&mut self.stream).poll_write(cx, buf))?;
        self.note_sent(&buf[..written])?;
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn frame(stream: u32, kind: u8, length: u32) -> Vec<u8> {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend(stream.to_be_bytes());
        bytes.extend([kind, 0]);
        bytes.resize(bytes.len() + length.min(64) as usize, 7);
        bytes
    }

    /// What a guarded client reads when it called with `calls` and the agent says `said`.
    async fn heard(calls: &[u32], said: &[u8]) -> io::Result<usize> {
        let (ours, mut agents) = tokio::io::duplex(1 << 16);
        let mut guarded = Guarded::new(ours);
        for stream in calls {
            guarded
                .write_all(&frame(*stream, MESSAGE_TYPE_REQUEST, 5))
                .await?;
        }
        agents.write_all(said).await?;
        agents.shutdown().await?;
        let mut heard = Vec::new();
        guarded.read_to_end(&mut heard).await
    }

    #[tokio::test]
    async fn read_of_one_response_per_request_passes() {
        let said = [frame(3, 2, 9), frame(1, 2, 0)].concat();
        assert_eq!(heard(&[1, 3], &said).await.unwrap(), said.len());
    }

    #[tokio::test]
    async fn read_of_anything_else_ends_the_connection() {
        for said in [
            frame(1, 3, 4),                            // data
            frame(1, 1, 4),                            // a request
            frame(5, 2, 4),                            // a response to nothing
            [frame(1, 2, 4), frame(1, 2, 4)].concat(), // twice
            frame(1, 2, (4 << 20) + 1),                // too long
            frame(1, 9, 0),                            // of no kind
        ] {
            let error = heard(&[1], &said).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }

    proptest::proptest! {
        #[test]
        fn feed_in_any_pieces_sees_the_same_headers(
            lengths in proptest::collection::vec(0u32..40, 1..20),
            cut in 1usize..30,
        ) {
            let bytes: Vec<u8> = lengths
                .iter()
                .enumerate()
                .flat_map(|(i, l)| frame(i as u32, 2, *l))
                .collect();
            let mut seen = Vec::new();
            let mut frames = Frames::default();
            for piece in bytes.chunks(cut) {
                frames.feed(piece, |h| { seen.push(h.length as u32); Ok(()) }).unwrap();
            }
            proptest::prop_assert_eq!(seen, lengths);
        }
    }
}
