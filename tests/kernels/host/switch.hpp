// Context switch between fibers: callee-saved registers and the stack pointer, on x86-64 and arm64 (ELF and Mach-O).
#pragma once

extern "C" void emulator_switch(void** save, void* load) asm("emulator_switch");

#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr int saved_words = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.p2align 2
.globl emulator_switch
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "the emulation needs a context switch for this processor"
#endif

// A stack on which the first switch enters `entry`.
inline void* prepare_stack(char* top, void (*entry)()) {
    auto aligned = reinterpret_cast<unsigned long long>(top) & ~63ull;
    void** sp = reinterpret_cast<void**>(aligned);
#if defined(__x86_64__)
    *--sp = nullptr;  // keeps the stack as after a call
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < saved_words; i++) *--sp = nullptr;
#else
    sp -= 20;
    for (int i = 0; i < 20; i++) sp[i] = nullptr;
    sp[11] = reinterpret_cast<void*>(entry);  // x30, the return address
#endif
    return sp;
}
