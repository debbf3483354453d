//! The bytes of a probe: an ICMP echo message, and the record that datagrams and streams carry. Pure.

/// What every probe carries, whatever brings it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// One prober's run: two probers in one namespace don't read each other's answers.
    pub run: u64,
    /// Number of the flow in its run.
    pub flow: u64,
    /// Sequence number in its flow.
    pub sequence: u64,
}

/// Length of a [`Record`] in bytes.
pub const RECORD: usize = 24;
const HEADER: usize = 8;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY_V6: u8 = 129;
const ECHO_REQUEST_V6: u8 = 128;

impl Record {
    /// The record as bytes.
    #[must_use]
    pub fn encode(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        for (place, value) in bytes.chunks_exact_mut(8).zip([self.run, self.flow, self.sequence]) {
            place.copy_from_slice(&value.to_be_bytes());
        }
        bytes
    }

    /// The record at the beginning of `bytes`.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut values = bytes.chunks_exact(8).map(|chunk| chunk.try_into().map(u64::from_be_bytes));
        let mut next = || values.next()?.ok();
        Some(Self { run: next()?, flow: next()?, sequence: next()? })
    }
}

/// An ICMP echo request with a record as its payload. For IPv6 the kernel writes the checksum, which is about addresses too.
#[must_use]
pub fn encode_echo(identifier: u16, record: Record, v6: bool) -> [u8; HEADER + RECORD] {
    let request = if v6 { ECHO_REQUEST_V6 } else { ECHO_REQUEST };
    let mut bytes = [0; HEADER + RECORD];
    let [_, _, _, _, _, _, high, low] = record.sequence.to_be_bytes();
    let [id_high, id_low] = identifier.to_be_bytes();
    let (header, payload) = bytes.split_at_mut(HEADER);
    header.copy_from_slice(&[request, 0, 0, 0, id_high, id_low, high, low]);
    payload.copy_from_slice(&record.encode());
    let sum = checksum(&bytes).to_be_bytes();
    for (place, byte) in bytes.iter_mut().skip(2).zip(sum) {
        *place = byte;
    }
    bytes
}

/// The record of an ICMP echo reply in an IPv4 packet, as a raw socket hands it over; `None` for any other packet.
#[must_use]
pub fn decode_echo_reply(packet: &[u8], identifier: u16) -> Option<Record> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    reply(packet.get(header..)?, identifier, ECHO_REPLY)
}

/// The same of a message of IPv6: a raw socket hands it over without its packet.
#[must_use]
pub fn decode_echo_reply_v6(message: &[u8], identifier: u16) -> Option<Record> {
    reply(message, identifier, ECHO_REPLY_V6)
}

fn reply(message: &[u8], identifier: u16, kind: u8) -> Option<Record> {
    let [high, low] = identifier.to_be_bytes();
    let ours = *message.first()? == kind && message.get(4..6)? == [high, low];
    ours.then(|| Record::decode(message.get(HEADER..)?))?
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| match pair {
            [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
            [high] => u32::from(*high) << 8,
            _ => 0,
        })
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD_OF_TEST: Record = Record { run: 7, flow: 3, sequence: 0x0001_0002 };

    fn reply(identifier: u16) -> Vec<u8> {
        let mut packet = vec![0x45; 20];
        packet.extend(encode_echo(identifier, RECORD_OF_TEST, false));
        packet[20] = ECHO_REPLY;
        packet
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        assert_eq!(Record::decode(&RECORD_OF_TEST.encode()), Some(RECORD_OF_TEST));
        assert_eq!(Record::decode(&RECORD_OF_TEST.encode()[..23]), None);
    }

    #[test]
    fn the_checksum_over_a_whole_message_is_zero() {
        assert_eq!(checksum(&encode_echo(0xbeef, RECORD_OF_TEST, false)), 0);
    }

    #[test]
    fn only_a_reply_with_our_identifier_is_ours() {
        assert_eq!(decode_echo_reply(&reply(9), 9), Some(RECORD_OF_TEST));
        assert_eq!(decode_echo_reply(&reply(9), 10), None, "another identifier");
        let mut request = reply(9);
        request[20] = ECHO_REQUEST;
        assert_eq!(decode_echo_reply(&request, 9), None, "somebody pings us");
        for length in 0..reply(9).len() {
            assert_eq!(decode_echo_reply(&reply(9)[..length], 9), None, "cut off at {length}");
        }
    }

    #[test]
    fn a_reply_of_icmpv6_comes_without_its_packet() {
        let mut message = encode_echo(9, RECORD_OF_TEST, true);
        assert_eq!(decode_echo_reply_v6(&message, 9), None, "a request");
        message[0] = ECHO_REPLY_V6;
        assert_eq!(decode_echo_reply_v6(&message, 9), Some(RECORD_OF_TEST));
        assert_eq!(decode_echo_reply_v6(&message, 10), None, "another identifier");
        assert_eq!(decode_echo_reply_v6(&message[..HEADER + 5], 9), None);
    }
}
