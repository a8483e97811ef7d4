"""The probe's kernels, in PTX that the driver compiles for any GPU since Pascal (compute capability 6.0)."""

# copy_words(target, source, words): one thread a 32-bit word; either address may be a peer's.
# add_one(counter, times): each thread adds 1 to the counter that many times, atomically for the whole system.
PTX = """
.version 5.0
.target sm_60
.address_size 64

.visible .entry copy_words(.param .u64 p_target, .param .u64 p_source, .param .u32 p_words)
{
    .reg .pred %p;
    .reg .b32 %r<6>;
    .reg .b64 %d<6>;
    ld.param.u64 %d0, [p_target];
    ld.param.u64 %d1, [p_source];
    ld.param.u32 %r0, [p_words];
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3;
    setp.ge.u32 %p, %r4, %r0;
    @%p bra DONE;
    cvta.to.global.u64 %d0, %d0;
    cvta.to.global.u64 %d1, %d1;
    mul.wide.u32 %d2, %r4, 4;
    add.u64 %d3, %d1, %d2;
    ld.volatile.global.u32 %r5, [%d3];
    add.u64 %d4, %d0, %d2;
    st.volatile.global.u32 [%d4], %r5;
DONE:
    membar.sys;
    ret;
}

.visible .entry add_one(.param .u64 p_counter, .param .u32 p_times)
{
    .reg .pred %p;
    .reg .b32 %r<4>;
    .reg .b64 %d;
    ld.param.u64 %d, [p_counter];
    ld.param.u32 %r0, [p_times];
    cvta.to.global.u64 %d, %d;
    mov.u32 %r1, 0;
AGAIN:
    setp.ge.u32 %p, %r1, %r0;
    @%p bra DONE;
    atom.sys.global.add.u32 %r2, [%d], 1;
    add.u32 %r1, %r1, 1;
    bra AGAIN;
DONE:
    membar.sys;
    ret;
}
"""
